"""One run's end of the broker: the asynchronous program that moves messages and blobs.

It does what `reply_ledger` says of each reply, and knows nothing of threads or of flwr (`grid_link`).
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Collection, Coroutine, Iterable, Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Any

from pydantic import TypeAdapter

from fedtide.aggregation.config import WorkerConfig
from fedtide.aggregation.folding.in_flight import (
    Arrived,
    Inbox,
    Node,
    Outstanding,
    RefusalCategory,
    check_size,
    is_theirs,
)
from fedtide.aggregation.folding.ingest import Ingest, RefusedUpdate
from fedtide.aggregation.folding.storage import Storage
from fedtide.aggregation.link.cohorts import Cohorts
from fedtide.aggregation.link.mandates import SUPERSEDED_CODE, End, Mandates
from fedtide.aggregation.link.phase_id import place_of
from fedtide.aggregation.link.reply_ledger import (
    Acknowledge,
    Action,
    CancelOrder,
    Delivered,
    Forget,
    GivenUp,
    HandOn,
    Late,
    NodeLeft,
    NodeReturned,
    NoReply,
    Publish,
    Read,
    ReadBrokenOff,
    ReadDone,
    ReadFailed,
    ReplyLedger,
    Sent,
    StartGrace,
    StopGrace,
    TellLost,
)
from fedtide.aggregation.link.reply_ledger import Event as LedgerEvent
from fedtide.fabric.encoding import from_json, one_of_from_json, to_json
from fedtide.fabric.errors import FedtideError, MalformedMessage, StaleWriter, TooLarge, TransientError
from fedtide.fabric.events.envelope import Event, EventData
from fedtide.fabric.ids import unguessable
from fedtide.fabric.messages.logs import LogLine, LogSegment
from fedtide.fabric.messages.run_questions import BacklogQuestion, RepliesReady, RepliesWanted, ReplyBacklog
from fedtide.fabric.messages.tasks import Cancel, Order, Reply, Task
from fedtide.fabric.nats.broker import Broker
from fedtide.fabric.nats.jetstream import Delivery, Received
from fedtide.fabric.nats.subjects import (
    CHECKPOINTS,
    DOWN,
    HUB_REGION,
    Presence,
    ReplyTo,
    Subjects,
    parse_as,
    reply_consumer,
    up_stream,
)
from fedtide.fabric.plans.round_policy import TimeIsUp
from fedtide.fabric.process.retry import until_done
from fedtide.fabric.trace_context import TraceContext, current, of_answer, within

_ORDER: TypeAdapter[Order] = TypeAdapter(Order)
log = logging.getLogger(__name__)

CANCEL_TTL_S = 24 * 3600.0
LISTENER_FAILED_CODE = 70
CATCH_UP_WITHIN_S = 60.0
TAKE_OVER_WITHIN_S = 30.0
LOG_PARTS, LOG_ATTEMPTS = 64, 4
"""So many parts of the log of one attempt are kept, and of so many attempts."""
CANCELLED_BEFORE = "given up before the aggregator was restarted"


class RunLink:
    """Each task that was sent puts one reply into its inbox. All methods belong to one loop."""

    storage: Storage
    ingest: Ingest
    cohorts: Cohorts
    mandates: Mandates

    def __init__(self, config: WorkerConfig, end: End) -> None:
        self._config = config
        self._end = end
        self._subjects = Subjects(config.tenant)
        self._ledger = ReplyLedger()
        self._sent: dict[str, Outstanding] = {}
        self._orders: dict[str, Task] = {}
        self._delivered: asyncio.Queue[Delivery] = asyncio.Queue(maxsize=1)
        self._deliveries: dict[int, Delivery] = {}
        self._arrived: dict[str, Arrived] = {}
        self._graces: dict[str, asyncio.TimerHandle] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._blobs: dict[str, list[str]] = {}
        self._does: Mapping[type, Callable[[Any], Awaitable[None]]] = {
            Acknowledge: self._acknowledge,
            CancelOrder: self._cancel_order,
            HandOn: self._hand_on,
            Publish: self._publish_order,
            Read: self._read,
            StartGrace: self._start_grace,
            StopGrace: self._stop_grace,
            TellLost: self._tell_lost,
        }
        self._sequence = 0
        self._log_parts = 0
        self._clock: tuple[tuple[int, int, str], Inbox] | None = None
        self.run_ends = False
        """Whether the run is to be completed now, with what it has."""

    async def start(self, broker: Broker) -> None:
        """Start listening for replies; `stop` closes the connection."""
        self._broker = broker
        self.storage = Storage(self._broker, self._config)
        self.mandates = Mandates(self._broker, self._config, self._end)
        self.ingest = Ingest.of(self._broker, self.storage, self._config, self.mandates.signer.headers)
        self.cohorts = Cohorts(self._broker, self._config, self._end, self.mandates)
        await self._broker.subscribe(self._subjects.all_presence, self._on_presence)
        await self._broker.subscribe(self._subjects.order(self._config.run), self._on_order)
        self._broker.when_reconnected(self._on_reconnect)
        taking_over = until_done(log, "grid.waits_for_coordinator", self._take_over_replies)
        await asyncio.gather(taking_over, self._read_order(), self.mandates.renew())
        needed = [(f"replies-{region}", self._listen(n, region)) for n, region in enumerate(self._config.regions)]
        for name, work in [("connection", self._broker.until_closed()), ("replies", self._take_in()), *needed]:
            task = asyncio.create_task(work, name=name)
            task.add_done_callback(self._end_if_over)
            self._tasks.add(task)

    async def _take_over_replies(self) -> None:
        wanted = RepliesWanted(attempt=self._config.attempt)
        subject = self._subjects.asked_by_run(self._config.run, "replies")
        raw = await self._broker.ask(subject, to_json(wanted), timeout_s=TAKE_OVER_WITHIN_S)
        if from_json(RepliesReady, raw, "replies").superseded:
            log.critical("grid.superseded", extra={"run": self._config.run, "attempt": self._config.attempt})
            self._end(SUPERSEDED_CODE)

    async def stop(self) -> None:
        """Disconnect. Outstanding tasks stay outstanding: the next attempt may adopt them."""
        await self.stop_listening()
        await self.ingest.shards.stop()
        await self._broker.close()

    def _end_if_over(self, task: asyncio.Task[None]) -> None:
        # Without its listener or its connection an aggregator would wait for ever: better a new attempt.
        if not task.cancelled():
            log.critical("grid.over", extra={"task": task.get_name()}, exc_info=task.exception())
            self._end(LISTENER_FAILED_CODE)

    async def stop_listening(self) -> None:
        """Stop consuming replies; from now on the run's consumer may be deleted."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def start_clock(self, round_: int, trial: int, phase: str, inbox: Inbox) -> None:
        """Put the coordinator's TimeIsUp for this phase into `inbox`, also if it was sent before."""
        if self._config.attempt > 1 and self._ledger.resumable:
            await self._caught_up()
        self._clock = ((round_, trial, phase), inbox)
        await self._read_order()

    async def _on_reconnect(self) -> None:
        self._spawn(self._resync())

    async def _resync(self) -> None:
        """Catch up after a disconnection: read the last TimeIsUp and the presence of nodes."""

        async def look() -> None:
            await self._read_order()
            await self.look_for_absent()

        await until_done(log, "grid.looks_again", look)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _later(self, seconds: float, work: Callable[[], Coroutine[Any, Any, None]]) -> asyncio.TimerHandle:
        return asyncio.get_running_loop().call_later(seconds, lambda: self._spawn(work()))

    async def _caught_up(self) -> None:
        """Wait for the replies that arrived before this attempt began: they count despite a TimeIsUp."""
        subject = self._subjects.asked_by_run(self._config.run, "backlog")
        question = to_json(BacklogQuestion(attempt=self._config.attempt))
        deadline = asyncio.get_running_loop().time() + CATCH_UP_WITHIN_S
        while asyncio.get_running_loop().time() < deadline:
            try:
                there = from_json(ReplyBacklog, await self._broker.ask(subject, question), "backlog")
            except TransientError:
                pass
            else:
                if there.superseded:
                    self._end(SUPERSEDED_CODE)
                if not there.waiting and there.unacknowledged <= self._ledger.unacknowledged:
                    return
            await asyncio.sleep(0.05)

    async def _read_order(self) -> None:
        raw = await self.storage.read(CHECKPOINTS, self._subjects.order(self._config.run))
        if raw is not None:
            self._apply_time_is_up(raw)

    async def _on_order(self, message: Received) -> None:
        self._apply_time_is_up(message.data)

    def _apply_time_is_up(self, raw: bytes) -> None:
        order = from_json(TimeIsUp, raw, "order")
        self.run_ends = self.run_ends or order.ends_run
        if self.run_ends:
            self.cohorts.run_ends = True
            self.cohorts.news.set()
        is_meant = self._clock is not None and self._clock[0] == (order.round, order.trial, order.phase)
        if self._clock is not None and (is_meant or self.run_ends):
            self._clock[1].put(order)
            self._clock = None

    async def send(self, task: Task, node: Node, inbox: Inbox) -> None:
        """Send a task to a node. It is stored: an offline node finds it when it returns."""
        self._orders[task.task] = task
        await self._wait_for(Sent(task.task, node.name), node, inbox, task.expires_at)

    async def adopt(self, task: str, node: Node, inbox: Inbox, expires_at: float) -> None:
        """Wait for a task that a predecessor sent in an earlier round or trial."""
        await self._wait_for(Sent(task, node.name, adopted=True), node, inbox, expires_at)
        if self._ledger.is_wanted(task) and await self._was_cancelled(task, node):
            await self._step(NoReply(task, CANCELLED_BEFORE))

    async def _wait_for(self, sent: Sent, node: Node, inbox: Inbox, expires_at: float) -> None:
        self._sent[sent.task] = Outstanding(node, inbox)
        expired = NoReply(sent.task, "no answer before the task expired", "timeout")
        self._later(max(0.0, expires_at - time.time()), lambda: self._step(expired))
        await self._step(sent)

    async def _was_cancelled(self, task: str, node: Node) -> bool:
        last = await self._broker.last(DOWN, self._subjects.task(node.region, node.name, self._config.run, task))
        return last is not None and isinstance(one_of_from_json(_ORDER, last.data, "order"), Cancel)

    async def give_up(self, tasks: Iterable[str]) -> None:
        """Stop waiting for these tasks, and cancel them on their nodes."""
        for task in tasks:
            await self._step(GivenUp(task))

    async def _step(self, event: LedgerEvent) -> None:
        await self._carry_out(self._ledger.step(event))

    async def _carry_out(self, actions: Iterable[Action]) -> None:
        """Do what the ledger asks for, in order."""
        for action in actions:
            if (does := self._does.get(type(action))) is not None:
                await does(action)

    async def _hand_on(self, action: HandOn) -> None:
        self._sent.pop(action.task).inbox.put(self._arrived.pop(action.task))

    async def _tell_lost(self, action: TellLost) -> None:
        lost = Arrived(action.task, None, lost=action.reason, category=action.category)
        self._sent[action.task].inbox.put(lost)

    async def _cancel_order(self, action: CancelOrder) -> None:
        self._spawn(self._publish_cancel(action.task, self._sent.pop(action.task).node))

    async def _acknowledge(self, action: Acknowledge) -> None:
        await self._deliveries.pop(action.sequence).ack()

    async def _publish_order(self, action: Publish) -> None:
        task, node = self._orders.pop(action.task), self._sent[action.task].node
        if self._config.attempt > 1 and await self._was_cancelled(task.task, node):
            await self._step(NoReply(task.task, CANCELLED_BEFORE))
            return
        subject = self._subjects.task(node.region, node.name, self._config.run, task.task)
        with suppress(StaleWriter):  # an earlier attempt has sent it
            ttl_s = max(1.0, task.expires_at - time.time())
            body = to_json(task)
            with within(self._trace_of(task, node)):
                await self._broker.publish(
                    subject,
                    body,
                    expected_last_of_subject=0,
                    ttl_s=ttl_s,
                    headers=self.mandates.signer.headers(subject, body),
                )

    def _trace_of(self, task: Task, node: Node) -> TraceContext | None:
        run, place = current(), place_of(task.task, self._config.run)
        if run is None or place is None:
            return run
        return of_answer(run, place.round, place.trial, place.phase, node.name)

    async def _publish_cancel(self, task: str, node: Node) -> None:
        order = to_json(Cancel(task=task, run=self._config.run))
        subject = self._subjects.task(node.region, node.name, self._config.run, task)
        try:
            signed = self.mandates.signer.headers(subject, order)
            await self._broker.publish(subject, order, ttl_s=CANCEL_TTL_S, headers=signed)
        except TransientError as exc:
            log.warning("grid.cancel_not_sent", extra={"task": task, "reason": str(exc)})

    async def report(self, *events: EventData) -> None:
        """Tell the coordinator, durably; retried until the broker has it."""
        for data in events:
            self._sequence += 1
            key = f"{self._config.run}.{self._config.attempt}.{self._sequence}"
            event = Event.now(f"aggregator/{self._config.run}", data, id=key)
            subject = self._subjects.report(HUB_REGION, self._config.run, data.kind.replace(".", "-"))
            await self._publish_until_stored(subject, to_json(event), key)

    async def _publish_until_stored(self, subject: str, data: bytes, key: str) -> None:
        message_id = unguessable()
        await until_done(
            log, "grid.report_waits", lambda: self._broker.publish(subject, data, message_id=message_id), key=key
        )

    async def store_log(self, lines: list[LogLine]) -> None:
        """Store what the app has printed; the oldest parts of a long log are replaced."""
        number, self._log_parts = self._log_parts, self._log_parts + 1
        part = LogSegment(attempt=self._config.attempt, number=number, lines=lines)
        slot = f"{self._config.attempt % LOG_ATTEMPTS}-{number % LOG_PARTS}"
        with suppress(FedtideError):
            await self._broker.publish(self._subjects.run_log(self._config.run, slot), to_json(part))

    async def disable_resume(self) -> None:
        """Stop keeping replies for resumption: those of unknown tasks are acknowledged and dropped."""
        await self._carry_out(self._ledger.disable_resume())

    async def close_round(self, counted: Collection[str], *, carries: bool) -> list[bytes]:
        """Acknowledge the round's replies, once its checkpoint is stored. Returns the late ones.

        Args:
            counted: tasks whose replies the round has processed.
            carries: keep replies that were received but not counted, for a later round.
        """
        actions = self._ledger.close_round(counted, carries=carries)
        late = [self._deliveries[action.sequence].data for action in actions if isinstance(action, Late)]
        await self._carry_out(actions)
        digests = [d for action in actions if isinstance(action, Forget) for d in self._blobs.pop(action.task, [])]
        await self.storage.forget_updates(digests if carries else None)
        return late

    async def _listen(self, number: int, region: str) -> None:
        """Receive the replies of a region, the `number`-th."""
        durable, streams = reply_consumer(self._config.run), len(self._config.regions)
        async for delivered in self._broker.pull(up_stream(region), durable):
            # Sequences are a stream's; these are of all streams together.
            await self._delivered.put(replace(delivered, sequence=delivered.sequence * streams + number))

    async def _take_in(self) -> None:
        """Take in the replies of all regions, one after the other."""
        while True:
            delivery = await self._delivered.get()
            try:
                address = parse_as(ReplyTo, delivery.subject)
            except MalformedMessage as exc:
                log.warning("grid.reply_refused", extra={"reason": str(exc)})
                await delivery.ack()
                continue
            sent = self._sent.get(address.task)
            if is_theirs(delivery.subject, address.task, sent.node.name if sent is not None else None):
                self._deliveries[delivery.sequence] = delivery
                await self._step(Delivered(address.task, address.node, delivery.sequence))
            else:
                await delivery.ack()

    async def _read(self, action: Read) -> None:
        task, delivery = action.task, self._deliveries[action.sequence]
        result: LedgerEvent = ReadDone(task)
        try:
            reply = from_json(Reply, delivery.data, "reply")
            self._blobs[task] = [ref.digest for ref in reply.message.blobs()]
            check_size(reply, self._config.spec.policy.max_update_bytes)
            frames = await self.ingest.read(reply, self._sent[task].node, lambda: self._ledger.is_wanted(task))
            size = len(delivery.data) + sum(ref.size_bytes for ref in reply.message.blobs())
            self._arrived[task] = Arrived(task, reply, frames or {}, frames is None, size)
        except TransientError as exc:
            log.warning("grid.reply_comes_again", extra={"task": task, "reason": str(exc)})
            result = ReadBrokenOff(task)
        except FedtideError as exc:
            category: RefusalCategory = exc.category if isinstance(exc, RefusedUpdate) else "malformed"
            result = ReadFailed(task, exc.what, "too_large" if isinstance(exc, TooLarge) else category)
        except Exception as exc:  # one reply, whatever is in it, must not end the run of all others
            log.exception("grid.reply_unreadable", extra={"task": task})
            result = ReadFailed(task, f"{type(exc).__name__}: {exc}", "malformed")
        await self._step(result)
        self._arrived.pop(task, None)  # of one that nobody waited for any more

    async def _on_presence(self, message: Received) -> None:
        name, online = parse_as(Presence, message.subject).node, message.data == b"online"
        self.cohorts.news.set()
        for task in self._ledger.wanted(name):
            why = f"node {name} went offline ({message.data.decode(errors='replace')})"
            await self._step(NodeReturned(task) if online else NodeLeft(task, why))

    async def look_for_absent(self) -> None:
        """Start the grace time of nodes that are offline already: no presence message will follow."""
        online = await self.cohorts.online()
        for task in self._ledger.wanted():
            name = self._sent[task].node.name
            await self._step(NodeReturned(task) if name in online else NodeLeft(task, f"node {name} is offline"))

    async def _stop_grace(self, action: StopGrace) -> None:
        if timer := self._graces.pop(action.task, None):
            timer.cancel()

    async def _start_grace(self, action: StartGrace) -> None:
        task, grace_s = action.task, self._config.spec.policy.node_grace_s
        reason = f"{action.why} and did not return in {grace_s:.0f} s"
        self._graces[task] = self._later(grace_s, lambda: self._grace_over(task, reason))

    async def _grace_over(self, task: str, reason: str) -> None:
        """Give a task up if the coordinator confirms that its node is offline: presence may be missed."""
        sent = self._sent.get(task)
        self._graces.pop(task, None)
        if sent is None:
            return
        if sent.node.name in set((await self.cohorts.ask(0, 1, "")).online):
            await self._step(NodeReturned(task))
        else:
            await self._step(NoReply(task, reason))
