"""The asynchronous half of the Grid: a loop in its own thread that moves messages and blobs.

Owns the broker connection and what is outstanding; knows nothing of flwr. The Grid calls it
from the ServerApp's threads through `call`.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import threading
import time
from collections.abc import Coroutine, Iterable
from typing import Any, TypeVar

from pydantic import ValidationError

from aggregation.config import WorkerConfig
from aggregation.in_flight import Arrived, Inbox, Loss, Node, Outstanding
from fabric.blobs import BlobRef
from fabric.broker import Broker
from fabric.errors import FedtideError, MalformedMessage, TransientError
from fabric.events import Event, EventData
from fabric.jetstream import Delivery, Received
from fabric.streams import HUB_DOMAIN
from fabric.subjects import DOWN, HUB_REGION, UP, Subjects, last_token, reply_consumer
from fabric.tensors import Buffer, frame_size
from fabric.transfer import Prefix, Source, put_blob, read_blob
from fabric.wire import INLINE_BYTES, Arrays, Cancel, Reply, Task

T = TypeVar("T")
log = logging.getLogger(__name__)

ROUND_BLOB_TTL_S = 24 * 3600.0
RETRY_S = 0.5
CANCEL_TTL_S = 24 * 3600.0
NODE_GRACE_S = 15.0
"""How long an offline node's task is waited for before the round goes on without it."""


def _die_if_failed(task: asyncio.Task[None]) -> None:
    # Without its listener an aggregator would wait for ever: better a new attempt.
    if not task.cancelled() and task.exception() is not None:
        log.critical("grid.listener_failed", exc_info=task.exception())
        os._exit(70)


class GridLink:
    """Runs the broker loop in a thread; each outstanding task is answered once, into its own queue."""

    def __init__(self, config: WorkerConfig) -> None:
        self._config = config
        self._subjects = Subjects(config.tenant)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="grid-link", daemon=True)
        self._outstanding: dict[str, Outstanding] = {}
        self._held: dict[str, Delivery] | None = {}
        self._taken: dict[str, Delivery] = {}
        self._graces: dict[str, asyncio.TimerHandle] = {}
        self._tasks: list[asyncio.Task[None]] = []
        self._sequence = 0

    def open(self) -> None:
        """Connect and start listening for replies.

        Raises:
            BrokerUnavailable: no server answered.
        """
        self._thread.start()
        self.call(self._open())

    async def _open(self) -> None:
        self._broker = await Broker.connect(self._config.nats_url, f"aggregator-{self._config.run}")
        await self._broker.subscribe(self._subjects.all_presence, self._on_presence)
        self._broker.when_reconnected(self.look_for_absent)
        listening = self._loop.create_task(self._listen(), name="replies")
        listening.add_done_callback(_die_if_failed)
        self._tasks.append(listening)

    def close(self) -> None:
        """Disconnect. What is outstanding stays so: a successor may take it up."""
        self.call(self._close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout=10)
        if not self._thread.is_alive():
            self._loop.close()

    async def _close(self) -> None:
        await self.stop_listening()
        await self._broker.close()

    async def stop_listening(self) -> None:
        """No reply is wanted any more: from here on the run's consumer may go."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def call(self, work: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine on the loop from another thread."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    async def nodes(self) -> list[Node]:
        """The run's nodes that are online now, as the coordinator selects them."""
        question = json.dumps({"run": self._config.run}).encode()
        while True:
            try:
                answer = await self._broker.ask(self._subjects.rpc("nodes"), question, timeout_s=5)
                break
            except TransientError as exc:
                log.warning("grid.waits_for_coordinator", extra={"reason": str(exc)})
                await asyncio.sleep(RETRY_S)
        return [Node.of(n["name"], n["region"]) for n in json.loads(answer)]

    def round_prefix(self, digest: str) -> str:
        return self._subjects.round_blob(self._config.run, digest)

    async def upload(self, frame: list[Buffer]) -> Arrays:
        """Make a frame available to every node: inline when small, else as a blob of this run's rounds."""
        if frame_size(frame) <= INLINE_BYTES:
            return Arrays(inline=b"".join(frame))
        return Arrays(blob=await self.store(frame, keep=False, prefix=self.round_prefix))

    async def store(
        self, parts: Iterable[Buffer], *, keep: bool, stream: str = DOWN, prefix: Prefix | None = None
    ) -> BlobRef:
        ttl_s = None if keep else ROUND_BLOB_TTL_S
        return await put_blob(self._broker, prefix or self._subjects.blob, stream, parts, ttl_s=ttl_s)

    async def fetch(self, ref: BlobRef, *, stream: str = DOWN, prefix: Prefix | None = None) -> bytearray:
        return await read_blob(Source(self._broker, stream), prefix or self._subjects.blob, ref)

    async def read(self, stream: str, subject: str) -> bytes | None:
        found = await self._broker.last(stream, subject)
        return None if found is None else found.data

    async def write(self, subject: str, data: bytes) -> None:
        """Store one message, however long the broker is away."""
        while True:
            try:
                await self._broker.publish(subject, data)
                return
            except TransientError:
                await asyncio.sleep(RETRY_S)

    async def send(self, task: Task, node: Node, inbox: Inbox) -> None:
        """Hand a task to a node (stored: a node that is away finds it when it comes back)."""
        self._outstanding[task.task] = Outstanding(node, inbox)
        left = max(0.0, task.expires_at - time.time())
        self._loop.call_later(left, self._lost, task.task, "no answer before the task expired", "timeout")
        early = self._held.pop(task.task, None) if self._held is not None else None
        if early is not None:
            # Answered before this process was there: the node is not asked again.
            await self._take(early)
            return
        subject = self._subjects.task(node.region, node.name, task.task)
        if self._config.attempt > 1 and await self._was_cancelled(subject):
            self._lost(task.task, "given up before the aggregator was restarted")
            return
        await self._broker.publish(
            subject,
            task.model_dump_json().encode(),
            message_id=task.task,
            ttl_s=max(1.0, task.expires_at - time.time()),
        )

    async def _was_cancelled(self, subject: str) -> bool:
        last = await self._broker.last(DOWN, subject)
        return last is not None and b'"kind":"cancel"' in last.data

    async def give_up(self, tasks: Iterable[str]) -> None:
        """Nobody waits for these tasks any more: tell their nodes."""
        for task in tasks:
            sent = self._outstanding.pop(task, None)
            if sent is not None:
                await self._cancel_order(task, sent.node)

    async def _cancel_order(self, task: str, node: Node) -> None:
        order = Cancel(task=task, run=self._config.run)
        subject = self._subjects.task(node.region, node.name, task)
        try:
            await self._broker.publish(subject, order.model_dump_json().encode(), ttl_s=CANCEL_TTL_S)
        except TransientError as exc:
            log.warning("grid.cancel_not_sent", extra={"task": task, "reason": str(exc)})

    async def report(self, *events: EventData) -> None:
        """Tell the coordinator, durably; retried until the broker has it."""
        source = f"aggregator/{self._config.run}"
        for data in events:
            self._sequence += 1
            key = f"{self._config.run}.{self._config.attempt}.{self._sequence}"
            event = Event.now(source, data, id=key)
            subject = self._subjects.report(HUB_REGION, self._config.run, data.kind.replace(".", "-"))
            await self._publish_until_stored(subject, event.model_dump_json().encode(), key)

    async def _publish_until_stored(self, subject: str, data: bytes, key: str) -> None:
        while True:
            try:
                await self._broker.publish(subject, data, message_id=key)
                return
            except TransientError:
                await asyncio.sleep(RETRY_S)

    async def stop_holding(self) -> None:
        """Nobody resumes rounds in this run: replies that belong to no task are late, and dropped at once."""
        held, self._held = self._held, None
        for delivery in (held or {}).values():
            await delivery.ack()

    async def close_round(self) -> list[bytes]:
        """The round's checkpoint is safe: its replies need not be delivered again. Returns those that were late."""
        late = [delivery.data for task, delivery in (self._held or {}).items() if task not in self._taken]
        done = {**self._taken, **(self._held or {})}
        self._taken.clear()
        if self._held is not None:
            self._held.clear()
        for delivery in done.values():
            await delivery.ack()
        return late

    async def forget_updates(self) -> None:
        """Delete the run's folded updates from the hub and the regions (they expire anyway)."""
        for domain in [HUB_DOMAIN, *self._config.regions]:
            await self._purge(UP, self._subjects.update_blobs(self._config.run), domain)

    async def forget_blob(self, ref: BlobRef) -> None:
        """Delete a round's model from the hub and every region's cache."""
        for domain in [HUB_DOMAIN, *self._config.regions]:
            await self._purge(DOWN, f"{self.round_prefix(ref.digest)}.>", domain)

    async def _purge(self, stream: str, pattern: str, domain: str) -> None:
        try:
            await self._broker.purge(stream, pattern, domain=domain)
        except FedtideError as exc:
            log.info("grid.purge_left_to_expiry", extra={"domain": domain, "reason": str(exc)})

    async def _listen(self) -> None:
        durable = reply_consumer(self._config.run)
        async for delivery in self._broker.consume(UP, durable, self._subjects.replies(self._config.run)):
            task = last_token(delivery.subject)
            if task in self._outstanding:
                await self._take(delivery)
            elif self._held is None:
                await delivery.ack()
            elif task in self._taken:
                # It comes again because its round is long; an early word would lose it for a successor.
                self._taken[task] = delivery
            else:
                self._held[task] = delivery

    async def _take(self, delivery: Delivery) -> None:
        """Hand a reply to whoever waits for it. While rounds can be resumed, it is acknowledged with its round."""
        task = last_token(delivery.subject)
        try:
            await self._receive(delivery)
        except TransientError as exc:
            log.warning("grid.reply_comes_again", extra={"task": task, "reason": str(exc)})
            return
        except FedtideError as exc:
            self._lost(task, str(exc), "malformed")
        if self._held is None:
            await delivery.ack()
        else:
            self._taken[task] = delivery

    async def _receive(self, delivery: Delivery) -> None:
        try:
            reply = Reply.model_validate_json(delivery.data)
        except ValidationError as exc:
            raise MalformedMessage(f"reply does not decode: {exc.errors()[0]['msg']}") from exc
        sent = self._outstanding[last_token(delivery.subject)]
        node = sent.node
        frames: dict[str, Buffer] = {}

        def prefix(digest: str) -> str:
            return self._subjects.update_blob(node.region, node.name, self._config.run, digest)

        for ref in reply.message.blobs():
            frames[ref.digest] = memoryview(await self.fetch(ref, stream=UP, prefix=prefix)).toreadonly()
        if self._outstanding.pop(reply.task, None) is not None:
            size = len(delivery.data) + sum(len(f) for f in frames.values())
            sent.inbox.put(Arrived(reply.task, reply, frames, size))

    async def _on_presence(self, message: Received) -> None:
        name, online = last_token(message.subject), message.data == b"online"
        for task in [t for t, sent in self._outstanding.items() if sent.node.name == name]:
            if online and (timer := self._graces.pop(task, None)):
                timer.cancel()
            elif not online:
                self._wait_no_longer(task, f"node {name} went offline ({message.data.decode()})")

    async def look_for_absent(self) -> None:
        """Nodes that were away before their task was sent: no news will come of them."""
        online = {n.name for n in await self.nodes()}
        for task, sent in list(self._outstanding.items()):
            if sent.node.name not in online:
                self._wait_no_longer(task, f"node {sent.node.name} is offline")

    def _wait_no_longer(self, task: str, why: str) -> None:
        if task not in self._graces:
            reason = f"{why} and did not return in {NODE_GRACE_S:.0f} s"
            self._graces[task] = self._loop.call_later(NODE_GRACE_S, self._lost, task, reason)

    def _lost(self, task: str, reason: str, category: Loss = "node_lost") -> None:
        self._graces.pop(task, None)
        if sent := self._outstanding.pop(task, None):
            sent.inbox.put(Arrived(task, None, lost=reason, category=category))
            # A node that returns should not go on with what nobody waits for.
            self._tasks.append(self._loop.create_task(self._cancel_order(task, sent.node)))
