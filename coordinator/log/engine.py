"""The loop around the reducers: decode, step, persist, run commands, acknowledge, in that order.

One event at a time. The result of a command comes back as an event through `submit`.
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import TypeVar

from fedtide.coordinator.commands import Commands
from fedtide.coordinator.identity import identities
from fedtide.coordinator.identity.report_rules import why_refused
from fedtide.coordinator.log.event_log import EventLog
from fedtide.coordinator.log.snapshot_codec import Snapshot
from fedtide.coordinator.log.snapshots import Snapshots
from fedtide.coordinator.state import World
from fedtide.fabric.encoding import to_json
from fedtide.fabric.errors import (
    FedtideError,
    InvalidTransition,
    MalformedMessage,
    StaleWriter,
    TooLarge,
    TransientError,
)
from fedtide.fabric.events.envelope import Event, EventData, decode_event
from fedtide.fabric.nats.broker import Broker
from fedtide.fabric.nats.jetstream import Received
from fedtide.fabric.nats.subjects import UP, Report, Subjects, parse_as
from fedtide.fabric.process.retry import Backoff

log = logging.getLogger(__name__)

SOURCE = "coordinator"
MAX_EVENT_BYTES = 1024 * 1024
SNAPSHOT_EVERY = 10_000
VIEW_EVERY_S = 0.1
_REMEMBERED_IDS = 100_000
_DURABLE = "coordinator"

Execute = Callable[[Commands], None]
V = TypeVar("V")


class Engine:
    """Owns the world. `execute` starts commands and returns at once."""

    def __init__(
        self, broker: Broker, subjects: Subjects, event_log: EventLog, snapshots: Snapshots, execute: Execute
    ) -> None:
        self._broker = broker
        self._subjects = subjects
        self._log = event_log
        self._snapshots = snapshots
        self._execute = execute
        self._to_save: asyncio.Queue[Snapshot] = asyncio.Queue(maxsize=1)
        self._saved_at = 0
        self._inbox: asyncio.Queue[tuple[Event, asyncio.Future[None]]] = asyncio.Queue(maxsize=10_000)
        self._seen: OrderedDict[str, None] = OrderedDict()
        self._watchers: set[asyncio.Event] = set()
        self._listeners: set[asyncio.Queue[Event]] = set()
        self.world = World()
        self.applied = 0
        self.refused = 0

    @property
    def waits_for(self) -> str:
        """Why the log cannot be written at the moment; empty: it can."""
        return self._log.waits_for

    async def load(self) -> None:
        """Start from the newest snapshot, if there is one."""
        snapshot = await self._snapshots.load()
        if snapshot is None:
            return
        self.world, self.applied = snapshot.world, snapshot.applied
        self._seen = OrderedDict.fromkeys(snapshot.seen)
        self._log.start_after(snapshot.sequence)
        self._saved_at = snapshot.sequence

    async def catch_up(self) -> None:
        """Apply what others have logged since."""
        async for event in self._log.replay():
            self.world.apply(event)
            self._remember(event)

    async def follow(self, leading: asyncio.Task[None]) -> None:
        """As a standby: keep the world up to date without acting on it, until `leading` is done."""
        woken = asyncio.Event()
        leading.add_done_callback(lambda _: woken.set())

        async def wake(_: Received) -> None:
            woken.set()

        unsubscribe = await self._broker.subscribe(self._subjects.all_events, wake)
        backoff = Backoff()
        while not leading.done():
            woken.clear()
            try:
                await self.catch_up()
                backoff.reset()
                if not leading.done():
                    await woken.wait()
            except TransientError as exc:
                log.info("engine.follows_later", extra={"reason": str(exc)})
                await backoff.wait()
        await unsubscribe()

    async def take_over(self, data: EventData) -> None:
        """Append `data` behind everything that was logged: from here on an older leader can append no more."""
        event = Event.now(SOURCE, data)
        while True:
            await self.catch_up()
            try:
                await self._handle(event)
                return
            except StaleWriter:
                # The old leader still appends; it has lost the lease, so it stops soon.
                log.info("engine.takes_over_again", extra={"last": self._log.last})

    def lead(self) -> None:
        """Begin to act as the leader: issue again exactly the commands that the state still needs."""
        log.info("coordinator.leads", extra={"events": self.applied})
        for commands in self.world.pending_commands():
            self._execute(commands)

    async def save_snapshots(self) -> None:
        """Store every snapshot that is due, for ever."""
        while True:
            snapshot = await self._to_save.get()
            try:
                await self._snapshots.save(snapshot)
            except FedtideError as exc:
                log.warning("snapshot.not_saved", extra={"reason": str(exc)})

    def _snapshot(self) -> None:
        if self._log.last - self._saved_at >= SNAPSHOT_EVERY and not self._to_save.full():
            self._saved_at = self._log.last
            copy = Snapshot(self._log.last, self.applied, self.world.copy(), list(self._seen))
            self._to_save.put_nowait(copy)

    async def run(self) -> None:
        """Apply events for ever.

        Raises:
            StaleWriter: another coordinator leads now.
        """
        while True:
            event, done = await self._inbox.get()
            try:
                await self._handle(event)
            except (InvalidTransition, TooLarge) as exc:
                self.refused += 1
                log.warning("event.refused", extra={"event": event.id, "reason": str(exc)})
                if not done.cancelled():
                    done.set_exception(exc)
            else:
                if not done.cancelled():
                    done.set_result(None)

    async def _handle(self, event: Event) -> None:
        if event.id in self._seen:
            return
        if len(to_json(event)) > MAX_EVENT_BYTES:
            raise TooLarge(f"event {event.id} is larger than {MAX_EVENT_BYTES} bytes")
        event, commands = await self._decide(event)
        await self._log.append(event)
        self._remember(event)
        self._snapshot()
        log.info("event.applied", extra={"kind": event.data.kind, "id": event.id})
        self._execute(commands)
        self.nudge()
        for listener in self._listeners:
            if not listener.full():  # a listener that does not keep up loses events: nothing waits for it
                listener.put_nowait(event)

    async def _decide(self, event: Event) -> tuple[Event, Commands]:
        """What follows from the event; one that cannot be applied is refused, and must not end an installation.

        Raises:
            InvalidTransition: the state does not allow it, or a reducer failed.
        """
        try:
            return self.world.decide(event)
        except FedtideError:
            raise
        except Exception as exc:  # an error of ours must not end an installation, again at each delivery
            log.exception("event.reducer_failed", extra={"event": event.id, "kind": event.data.kind})
            self.world = await self._rebuilt()  # a part of it may have changed before the reducer failed
            reason = f"event {event.id} cannot be applied: {type(exc).__name__}: {exc}"
            raise InvalidTransition(reason, "This is an error of fedtide; see the coordinator's log") from exc

    async def _rebuilt(self) -> World:
        """The world as the snapshot and the log say it is; readers keep the old one until it is there."""
        snapshot = await self._snapshots.load()
        world = snapshot.world if snapshot is not None else World()
        self._log.start_after(snapshot.sequence if snapshot is not None else 0)
        async for event in self._log.replay():
            world.apply(event)
        return world

    def nudge(self) -> None:
        """Something that is shown has changed, though nothing was logged."""
        for watcher in self._watchers:
            watcher.set()

    def _remember(self, event: Event) -> None:
        self.applied += 1
        self._seen[event.id] = None
        if len(self._seen) > _REMEMBERED_IDS:
            self._seen.popitem(last=False)

    async def submit(self, data: EventData, *, id: str | None = None) -> None:
        """Record something that happened here; returns once it is in the log and acted upon.

        Raises:
            InvalidTransition: the state does not allow it.
        """
        await self._put(Event.now(SOURCE, data, id=id))

    async def _put(self, event: Event) -> None:
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        await self._inbox.put((event, done))
        await done

    async def listen(self, leads: Callable[[], Awaitable[None]]) -> None:
        """Take in the reports of nodes and aggregators for ever; each is acknowledged once it is in the log.

        Args:
            leads: returns once it is certain that this process still leads.
        """
        async for delivery in self._broker.consume(UP, _DURABLE, self._subjects.all_reports, may_ask=leads):
            try:
                # The coordinator sets time and decisions itself: those that a sender wrote do not count.
                event = decode_event(delivery.data)
                self._check(delivery.subject, event)
                await self._put(event.model_copy(update={"time": datetime.now(UTC), "decided": ""}))
            except (MalformedMessage, InvalidTransition, TooLarge) as exc:
                log.warning("report.refused", extra={"subject": delivery.subject, "reason": str(exc)})
            await delivery.ack()

    def _check(self, subject: str, event: Event) -> None:
        sender = parse_as(Report, subject)
        reason = why_refused(sender, event.data)
        if reason is None and identities.is_revoked(self.world.identities, sender.node):
            reason = "its credentials were revoked"
        if reason is not None:
            raise MalformedMessage(reason)

    @contextmanager
    def listening(self, events: asyncio.Queue[Event]) -> Iterator[None]:
        """While in the block, every event that was logged is put into `events`."""
        self._listeners.add(events)
        try:
            yield
        finally:
            self._listeners.discard(events)

    @contextmanager
    def watch(self) -> Iterator[Callable[[], Awaitable[None]]]:
        """Gives a function that returns after the next change of the world (changes coalesce)."""
        flag = asyncio.Event()
        self._watchers.add(flag)

        async def changed() -> None:
            await flag.wait()
            flag.clear()

        try:
            yield changed
        finally:
            self._watchers.discard(flag)


async def views_of(engine: Engine, view: Callable[[], V], *, last: Callable[[], bool]) -> AsyncIterator[V]:
    """`view()` now and after changes that alter it, at most ten a second, until `last()` holds."""
    with engine.watch() as changed:
        shown: V | None = None
        while True:
            current, ended = view(), last()
            if current != shown:
                yield current
                shown = current
            if ended:
                return
            await changed()
            await asyncio.sleep(VIEW_EVERY_S)  # a view costs more than an event, so several events share one
