"""The loop around the reducers. With everything that is queued it does, in this order:

1. Step. Each event goes through the reducers (`fedtide.coordinator.reducers`), on a draft of the world. One that cannot
   be applied is refused, and costs the others nothing.
2. Append. Those that were accepted go to the log, as one batch: all of them are in it, or none.
3. Commit. Only now the draft becomes the world: what no log holds is shown to nobody.
4. Command. What follows is handed to the executor, in the order of the log.
5. Acknowledge. Whoever asked learns what came of it; the next batch begins.

An append may take for ever, be refused, or be lost half-way. Then steps 3 to 5 have not happened: nothing was shown,
done or acknowledged. The result of a command comes back as an event through `submit`.
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from typing import NamedTuple, NoReturn, TypeVar

from fedtide.coordinator import reducers
from fedtide.coordinator.commands import Commands
from fedtide.coordinator.log.event_log import SOURCE, EventLog
from fedtide.coordinator.log.snapshot_codec import Snapshot
from fedtide.coordinator.log.snapshots import Snapshots
from fedtide.coordinator.state import World
from fedtide.fabric.encoding import to_json
from fedtide.fabric.errors import (
    FedtideError,
    InvalidTransition,
    LogLost,
    ReducerFailed,
    StaleWriter,
    TooLarge,
    TransientError,
)
from fedtide.fabric.events.envelope import Event, EventData
from fedtide.fabric.nats.broker import Broker
from fedtide.fabric.nats.jetstream import Received
from fedtide.fabric.nats.subjects import EVENTS, Subjects
from fedtide.fabric.process.retry import Backoff, until_done

log = logging.getLogger(__name__)

MAX_EVENT_BYTES = 1024 * 1024
SNAPSHOT_EVERY = 10_000
VIEW_EVERY_S = 0.1
_REMEMBERED_IDS = 100_000
_QUEUED = 10_000

BATCH_FROM, BATCH_TO, BATCH_BYTES = 32, 1000, 8 * 1024 * 1024
"""From how many events on they are appended together, and the most of one batch. Fewer go one by one: a batch costs the
broker some milliseconds in any case."""

Execute = Callable[[str, Commands], None]
"""Takes the commands that follow from an event, and its id, and returns at once."""
TAKE_OVER = "take-over"
"""Stands for the id of the event where commands follow from the state as a whole."""
V = TypeVar("V")


class Queued(NamedTuple):
    """An event, and what tells its sender that it is logged and acted upon, or why not."""

    event: Event
    done: asyncio.Future[None]


class Accepted(NamedTuple):
    """An event that the reducers accept: as it is to be logged, also as JSON, and what follows from it."""

    event: Event
    data: bytes
    commands: Commands
    copies: list[asyncio.Future[None]]
    """Who waits for it: one, or more if it came more than once."""


class Refusal(NamedTuple):
    """Who waits for an event that is not logged, and why it is not."""

    done: asyncio.Future[None]
    reason: Exception


class Engine:
    """Owns the world, as of the last event that is in the log."""

    def __init__(
        self,
        broker: Broker,
        subjects: Subjects,
        event_log: EventLog,
        snapshots: Snapshots,
        batch_from: int = BATCH_FROM,
    ) -> None:
        self._batch_from = batch_from
        self._broker = broker
        self._subjects = subjects
        self._log = event_log
        self._snapshots = snapshots
        self._execute: Execute | None = None
        self._to_save: asyncio.Queue[Snapshot] = asyncio.Queue(maxsize=1)
        self._saved_at = 0
        self._inbox: asyncio.Queue[Queued] = asyncio.Queue(maxsize=_QUEUED)
        self._seen: OrderedDict[str, None] = OrderedDict()
        self._watchers: set[asyncio.Event] = set()
        self._listeners: set[asyncio.Queue[Event]] = set()
        self.world = World()
        self.applied = 0
        self.refused = 0
        self.last_before_take_over: datetime | None = None
        """When the last event was logged before this process took over; None: it knows of none."""
        self.last_at: datetime | None = None
        """When the last event was logged that this process has read; None: it has read none."""
        self.left_out: dict[str, tuple[Event, str]] = {}
        """Events of the log that this version cannot apply, with the reason."""

    @property
    def waits_for(self) -> str:
        """Why the log cannot be written at the moment; empty: it can."""
        return self._log.waits_for

    @property
    def last_sequence(self) -> int:
        """Of the newest event in the log that this process knows of."""
        return self._log.last

    async def load(self) -> None:
        """Start from the newest snapshot, if there is one.

        Raises:
            LogLost: the log ends before the snapshot: it was lost, or an older one was put back.
        """
        snapshot = await self._snapshots.load()
        if snapshot is None:
            return
        last = await self._broker.last_sequence(EVENTS)
        if last < snapshot.sequence:
            raise LogLost(
                f"the event log ends at {last}, but its snapshot is of event {snapshot.sequence}",
                "Put the stream EVENTS back as it was, or start with an empty store (both streams, EVENTS and CONTROL)",
            )
        self.world, self.applied = snapshot.world, snapshot.applied
        self._seen = OrderedDict.fromkeys(snapshot.seen)
        self._log.start_after(snapshot.sequence)
        self._saved_at = snapshot.sequence
        self.last_at = snapshot.at
        self.left_out = {event.id: (event, reason) for event, reason in snapshot.left_out}

    async def catch_up(self) -> None:
        """Apply what others have logged since. What this version cannot apply is left out, and told."""
        async for event in self._log.replay():
            try:
                self._decide(self.world, event)
            except (InvalidTransition, TooLarge) as exc:
                self.left_out[event.id] = event, str(exc)
                log.error("event.left_out", extra={"event": event.id, "reason": str(exc)})
            self._remember(event)

    async def follow(self, leads: asyncio.Event) -> None:
        """As a standby: keep the world up to date without acting on it, until this process `leads`."""
        woken = asyncio.Event()

        async def wake_at_last() -> None:
            await leads.wait()
            woken.set()

        leading = asyncio.create_task(wake_at_last())

        async def wake(_: Received) -> None:
            woken.set()

        unsubscribe = await self._broker.subscribe(self._subjects.all_events, wake)
        backoff = Backoff()
        try:
            while not leads.is_set():
                woken.clear()
                try:
                    await self.catch_up()
                    backoff.reset()
                    if not leads.is_set():
                        await woken.wait()
                except TransientError as exc:
                    log.info("engine.follows_later", extra={"reason": str(exc)})
                    await backoff.wait()
        finally:
            leading.cancel()
        await unsubscribe()

    async def take_over(self, data: EventData) -> None:
        """Append `data` behind everything that was logged: from here on an older leader can append no more.

        Raises:
            CredentialsRefused: the broker does not let this process in any more.
        """
        event = Event.now(SOURCE, data)
        while True:
            await until_done(log, "engine.take_over_waits", self.catch_up)
            self.last_before_take_over = self.last_at
            try:
                done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
                await self._handle([Queued(event, done)])
                await done
                return
            except StaleWriter:
                # The old leader still appends; it has lost the lease, so it stops soon.
                log.info("engine.takes_over_again", extra={"last": self._log.last})

    def lead(self, execute: Execute) -> None:
        """Begin to act as the leader: issue again exactly the commands that the state still needs.

        Args:
            execute: takes commands from here on.
        """
        log.info("coordinator.leads", extra={"events": self.applied})
        self._execute = execute
        for commands in self.world.pending_commands():
            if commands:
                execute(TAKE_OVER, commands)

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
            world, seen, left_out = self.world.copy(), list(self._seen), list(self.left_out.values())
            self._to_save.put_nowait(Snapshot(self._log.last, self.applied, world, seen, self.last_at, left_out))

    async def run(self) -> None:
        """Apply events for ever.

        Raises:
            StaleWriter: another coordinator leads now.
        """
        while True:
            queued = [await self._inbox.get()]
            while not self._inbox.empty() and len(queued) < BATCH_TO:
                queued.append(self._inbox.get_nowait())
            for batch in [queued] if len(queued) >= self._batch_from else [[each] for each in queued]:
                await self._handle(batch)

    async def _handle(self, queued: Sequence[Queued]) -> None:
        draft = self.world.draft()
        left = list(queued)
        while left:
            accepted, refused, left = self._step(draft, left)
            if accepted:
                await self._log.append([(each.event, each.data) for each in accepted])
                draft.commit()
                self._committed(accepted)
            for done, reason in refused:  # only now: the reason may be an event that was not logged yet
                self._tell(done, reason)

    def _step(self, draft: World, queued: Sequence[Queued]) -> tuple[list[Accepted], list[Refusal], list[Queued]]:
        """Step 1, as far as one append goes; also returns what is refused, and what is left for the next append."""
        accepted: dict[str, Accepted] = {}
        refused: list[Refusal] = []
        size = 0
        for position, (event, done) in enumerate(queued):
            if event.id in self._seen:
                self._tell(done, None)
                continue
            if (same := accepted.get(event.id)) is not None:
                same.copies.append(done)
                continue
            try:
                logged, data, commands = self._decide(draft, event)
            except (InvalidTransition, TooLarge) as exc:
                self.refused += 1
                log.warning("event.refused", extra={"event": event.id, "reason": str(exc)})
                refused.append(Refusal(done, exc))
                continue
            accepted[event.id] = Accepted(logged, data, commands, [done])
            size += len(data)
            if size > BATCH_BYTES:
                return list(accepted.values()), refused, list(queued[position + 1 :])
        return list(accepted.values()), refused, []

    @staticmethod
    def _decide(world: World, event: Event) -> tuple[Event, bytes, Commands]:
        """The event as it is to be logged, that as JSON, and what follows; the world changes as a whole or not at all.

        Raises:
            InvalidTransition: the state does not allow it, or a reducer failed.
            TooLarge: it does not fit the log.
        """
        draft = world.draft()
        try:
            logged, commands = reducers.step(draft, event)
            data = to_json(logged)
            if len(data) > MAX_EVENT_BYTES:
                raise TooLarge(f"event {event.id} is larger than {MAX_EVENT_BYTES} bytes")
            draft.commit()
            return logged, data, commands
        except (InvalidTransition, TooLarge):
            raise
        except Exception as exc:  # an error of ours must not end an installation, again at each delivery
            log.exception("event.reducer_failed", extra={"event": event.id, "kind": event.data.kind})
            reason = f"event {event.id} cannot be applied: {type(exc).__name__}: {exc}"
            raise ReducerFailed(reason, "This is an error of fedtide; see the coordinator's log") from exc

    def _committed(self, accepted: Sequence[Accepted]) -> None:
        """Steps 4 and 5: the events are in the log and in the world."""
        for event, _, commands, copies in accepted:
            self._remember(event)
            log.debug("event.applied", extra={"kind": event.data.kind, "id": event.id})
            if commands and self._execute is not None:
                self._execute(event.id, commands)
            for done in copies:
                self._tell(done, None)
            for listener in self._listeners:
                if not listener.full():  # a listener that does not keep up loses events: nothing waits for it
                    listener.put_nowait(event)
        self._snapshot()
        self.nudge()

    @staticmethod
    def _tell(done: asyncio.Future[None], refused: Exception | None) -> None:
        if done.done():  # its sender waits no more
            return
        if refused is None:
            done.set_result(None)
        else:
            done.set_exception(refused)

    def nudge(self) -> None:
        """Something that is shown has changed, though nothing was logged."""
        for watcher in self._watchers:
            watcher.set()

    def _remember(self, event: Event) -> None:
        self.applied += 1
        self.last_at = event.time
        self._seen[event.id] = None
        if len(self._seen) > _REMEMBERED_IDS:
            self._seen.popitem(last=False)

    async def submit(self, data: EventData, *, id: str | None = None) -> None:
        """Record something that happened here; returns once it is in the log and acted upon.

        Raises:
            InvalidTransition: the state does not allow it.
        """
        await (await self.put(Event.now(SOURCE, data, id=id)))

    async def put(self, event: Event) -> asyncio.Future[None]:
        """Queue an event; the future ends as `submit` does."""
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        await self._inbox.put(Queued(event, done))
        return done

    @contextmanager
    def listening(self, events: asyncio.Queue[Event]) -> Iterator[None]:
        """While in the block, every event that was logged is put into `events`."""
        self._listeners.add(events)
        try:
            yield
        finally:
            self._listeners.discard(events)

    async def show(self, look: Callable[[Event], None]) -> NoReturn:
        """Call `look` for every event that is logged from now on; for what only looks on.

        An error of it is logged: a figure that is missing must end no coordinator.
        """
        events: asyncio.Queue[Event] = asyncio.Queue()
        with self.listening(events):
            while True:
                event = await events.get()
                try:
                    look(event)
                except Exception:  # an error of who looks on must end no coordinator
                    log.exception("event.look_failed", extra={"event": event.id, "kind": event.data.kind})

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
