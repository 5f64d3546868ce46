"""The asynchronous half of the Grid: a loop in its own thread that moves messages and blobs.

Owns the broker connection and the outstanding tasks; independent of flwr. The Grid calls it
from the ServerApp's threads through `call`.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Collection, Coroutine, Iterable
from typing import Any, TypeVar

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
from fedtide.aggregation.link.cohorts import Cohorts, End
from fedtide.fabric.encoding import from_json, to_json
from fedtide.fabric.errors import FedtideError, TooLarge, TransientError
from fedtide.fabric.events.envelope import Event, EventData
from fedtide.fabric.messages.tasks import Cancel, Reply, Task
from fedtide.fabric.nats.broker import Broker
from fedtide.fabric.nats.jetstream import Delivery, Received
from fedtide.fabric.nats.subjects import (
    CHECKPOINTS,
    DOWN,
    HUB_REGION,
    UP,
    Presence,
    ReplyTo,
    Subjects,
    parse_as,
    reply_consumer,
)
from fedtide.fabric.plans.round_policy import TimeIsUp
from fedtide.fabric.process.retry import until_done

T = TypeVar("T")
log = logging.getLogger(__name__)

CANCEL_TTL_S = 24 * 3600.0
LISTENER_FAILED_CODE = 70
CATCH_UP_WITHIN_S = 60.0


class GridLink:
    """Runs the broker loop in a thread; each outstanding task puts one reply into its inbox."""

    def __init__(self, config: WorkerConfig, end: End) -> None:
        self._config = config
        self._end = end
        self._subjects = Subjects(config.tenant)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="grid-link", daemon=True)
        self._outstanding: dict[str, Outstanding] = {}
        self._held: dict[str, Delivery] | None = {}
        self._taken: dict[str, Delivery] = {}
        self._graces: dict[str, asyncio.TimerHandle] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._closed: set[str] = set()
        self._blobs: dict[str, list[str]] = {}
        self._sequence = 0
        self._clock: tuple[tuple[int, int, str], Inbox] | None = None

    def open(self) -> None:
        """Connect and start listening for replies.

        Raises:
            BrokerUnavailable: no server answered.
        """
        self._thread.start()
        self.call(self._open())

    async def _open(self) -> None:
        config = self._config
        self._broker = await Broker.connect(config.nats_url, f"aggregator-{config.run}", config.access)
        self.storage = Storage(self._broker, self._config)
        self.ingest = Ingest.of(self._broker, self.storage, self._config)
        self.cohorts = Cohorts(self._broker, self._config, self._end)
        await self._broker.subscribe(self._subjects.all_presence, self._on_presence)
        await self._broker.subscribe(self._subjects.order(self._config.run), self._on_order)
        self._broker.when_reconnected(self._on_reconnect)
        for needed, name in ((self._listen(), "replies"), (self._broker.until_closed(), "connection")):
            task = self._loop.create_task(needed, name=name)
            task.add_done_callback(self._end_if_over)
            self._tasks.add(task)

    def _end_if_over(self, task: asyncio.Task[None]) -> None:
        # Without its listener or its connection an aggregator would wait for ever: better a new attempt.
        if not task.cancelled():
            log.critical("grid.over", extra={"task": task.get_name()}, exc_info=task.exception())
            self._end(LISTENER_FAILED_CODE)

    def close(self) -> None:
        """Disconnect. Outstanding tasks stay outstanding: the next attempt may adopt them."""
        self.call(self._close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout=10)
        if not self._thread.is_alive():
            self._loop.close()

    async def _close(self) -> None:
        await self.stop_listening()
        await self.ingest.shards.stop()
        await self._broker.close()

    async def stop_listening(self) -> None:
        """Stop consuming replies; from now on the run's consumer may be deleted."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def call(self, work: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine on the loop from another thread."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    async def start_clock(self, round_: int, trial: int, phase: str, inbox: Inbox) -> None:
        """Put the coordinator's TimeIsUp for this phase into `inbox`, also if it was sent before."""
        if self._config.attempt > 1 and self._held is not None:
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
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _caught_up(self) -> None:
        """Wait for the replies that arrived before this attempt began: they count despite a TimeIsUp."""
        durable = reply_consumer(self._config.run)
        deadline = self._loop.time() + CATCH_UP_WITHIN_S
        while self._loop.time() < deadline:
            try:
                pending, unacknowledged = await self._broker.backlog(UP, durable)
            except TransientError:
                pending = 1
            else:
                if not pending and unacknowledged <= len(self._held or ()) + len(self._taken):
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
        if self._clock is not None and self._clock[0] == (order.round, order.trial, order.phase):
            self._clock[1].put(order)
            self._clock = None

    async def send(self, task: Task, node: Node, inbox: Inbox) -> None:
        """Send a task to a node. It is stored: an offline node finds it when it returns."""
        self._outstanding[task.task] = Outstanding(node, inbox)
        left = max(0.0, task.expires_at - time.time())
        self._loop.call_later(left, self._lost, task.task, "no answer before the task expired", "timeout")
        early = self._held.pop(task.task, None) if self._held is not None else None
        if early is not None:
            # The reply arrived before this attempt began: the node is not asked again.
            await self._take(early)
            return
        subject = self._subjects.task(node.region, node.name, task.task)
        if self._config.attempt > 1 and await self._was_cancelled(subject):
            self._lost(task.task, "given up before the aggregator was restarted")
            return
        await self._broker.publish(
            subject,
            to_json(task),
            message_id=task.task,
            ttl_s=max(1.0, task.expires_at - time.time()),
        )

    async def adopt(self, task: str, node: Node, inbox: Inbox, expires_at: float) -> None:
        """Wait for a task that a predecessor sent in an earlier round or trial."""
        self._outstanding[task] = Outstanding(node, inbox)
        left = max(0.0, expires_at - time.time())
        self._loop.call_later(left, self._lost, task, "no answer before the task expired", "timeout")
        early = self._held.pop(task, None) if self._held is not None else None
        if early is not None:
            await self._take(early)
        elif await self._was_cancelled(self._subjects.task(node.region, node.name, task)):
            self._lost(task, "given up before the aggregator was restarted")

    async def _was_cancelled(self, subject: str) -> bool:
        last = await self._broker.last(DOWN, subject)
        return last is not None and b'"kind":"cancel"' in last.data

    async def give_up(self, tasks: Iterable[str]) -> None:
        """Stop waiting for these tasks, and cancel them on their nodes."""
        for task in tasks:
            sent = self._outstanding.pop(task, None)
            if sent is not None:
                await self._cancel_order(task, sent.node)

    async def _cancel_order(self, task: str, node: Node) -> None:
        order = Cancel(task=task, run=self._config.run)
        subject = self._subjects.task(node.region, node.name, task)
        try:
            await self._broker.publish(subject, to_json(order), ttl_s=CANCEL_TTL_S)
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
        await until_done(log, "grid.report_waits", lambda: self._broker.publish(subject, data, message_id=key), key=key)

    async def disable_resume(self) -> None:
        """Stop keeping replies for resumption: those of unknown tasks are acknowledged and dropped."""
        held, self._held = self._held, None
        for delivery in (held or {}).values():
            await delivery.ack()

    async def close_round(self, counted: Collection[str], *, carries: bool) -> list[bytes]:
        """Acknowledge the round's replies, once its checkpoint is stored. Returns the late ones.

        Args:
            counted: tasks whose replies the round has processed.
            carries: keep replies that were received but not counted, for a later round.
        """
        held = dict(self._held or {})
        over = [t for t in self._taken if t in counted] if carries else list(self._taken)
        done = {**{task: self._taken.pop(task) for task in over}, **held}
        late = [delivery.data for task, delivery in done.items() if task not in counted]
        if self._held is not None:
            self._held.clear()
        for delivery in done.values():
            await delivery.ack()
        self._closed.update(done)
        digests = [d for task in done for d in self._blobs.pop(task, [])]
        await self.storage.forget_updates(digests if carries else None)
        return late

    async def _listen(self) -> None:
        durable = reply_consumer(self._config.run)
        async for delivery in self._broker.consume(UP, durable, self._subjects.replies(self._config.run)):
            task = parse_as(ReplyTo, delivery.subject).task
            known = self._taken.get(task) or (self._held or {}).get(task)
            asked = self._outstanding.get(task)
            if not is_theirs(delivery.subject, task, asked.node.name if asked is not None else None):
                await delivery.ack()
            elif asked is not None:
                await self._take(delivery)
            elif self._held is None or task in self._closed:
                await delivery.ack()
            elif known is not None and known.sequence != delivery.sequence:
                await delivery.ack()  # a duplicate: its node missed the acknowledgement of the first one
            elif task in self._taken:
                # Redelivered because the round is long; acknowledged now, it would be lost to the next attempt.
                self._taken[task] = delivery
            else:
                self._held[task] = delivery

    async def _take(self, delivery: Delivery) -> None:
        """Put a reply into its task's inbox. While rounds can be resumed, it is acknowledged with its round."""
        task = parse_as(ReplyTo, delivery.subject).task
        try:
            await self._receive(delivery)
        except TransientError as exc:
            log.warning("grid.reply_comes_again", extra={"task": task, "reason": str(exc)})
            return
        except FedtideError as exc:
            category: RefusalCategory = exc.category if isinstance(exc, RefusedUpdate) else "malformed"
            self._lost(task, exc.what, "too_large" if isinstance(exc, TooLarge) else category)
        if self._held is None:
            await delivery.ack()
        else:
            self._taken[task] = delivery

    async def _receive(self, delivery: Delivery) -> None:
        reply = from_json(Reply, delivery.data, "reply")
        sent = self._outstanding[parse_as(ReplyTo, delivery.subject).task]
        self._blobs[reply.task] = [ref.digest for ref in reply.message.blobs()]
        check_size(reply, self._config.spec.policy.max_update_bytes)
        frames = await self.ingest.read(reply, sent.node, lambda: reply.task in self._outstanding)
        if self._outstanding.pop(reply.task, None) is not None:
            size = len(delivery.data) + sum(ref.size_bytes for ref in reply.message.blobs())
            sent.inbox.put(Arrived(reply.task, reply, frames or {}, frames is None, size))

    async def _on_presence(self, message: Received) -> None:
        name, online = parse_as(Presence, message.subject).node, message.data == b"online"
        self.cohorts.news.set()
        for task in [t for t, sent in self._outstanding.items() if sent.node.name == name]:
            if online:
                self._wait_on(task)
            else:
                self._wait_no_longer(task, f"node {name} went offline ({message.data.decode()})")

    async def look_for_absent(self) -> None:
        """Start the grace time of nodes that are offline already: no presence message will follow."""
        online = await self.cohorts.online()
        for task, sent in list(self._outstanding.items()):
            if sent.node.name in online:
                self._wait_on(task)
            else:
                self._wait_no_longer(task, f"node {sent.node.name} is offline")

    def _wait_on(self, task: str) -> None:
        if timer := self._graces.pop(task, None):
            timer.cancel()

    def _wait_no_longer(self, task: str, why: str) -> None:
        if task not in self._graces:
            grace_s = self._config.spec.policy.node_grace_s
            reason = f"{why} and did not return in {grace_s:.0f} s"
            self._graces[task] = self._loop.call_later(grace_s, lambda: self._spawn(self._grace_over(task, reason)))

    async def _grace_over(self, task: str, reason: str) -> None:
        """Give a task up if the coordinator confirms that its node is offline: presence may be missed."""
        sent = self._outstanding.get(task)
        self._graces.pop(task, None)
        if sent is not None and sent.node.name not in set((await self.cohorts.ask(0, 1, "")).online):
            self._lost(task, reason)

    def _lost(self, task: str, reason: str, category: RefusalCategory = "node_lost") -> None:
        self._graces.pop(task, None)
        if sent := self._outstanding.pop(task, None):
            sent.inbox.put(Arrived(task, None, lost=reason, category=category))
            # A node that returns should not work on a task that was given up.
            self._spawn(self._cancel_order(task, sent.node))
