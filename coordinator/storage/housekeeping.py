"""Deletes what nobody needs, and watches how full hub and regions are, while this coordinator leads.

What was read is deleted with a delay: a server that loses power may lose what it has stored in the last minutes, and
then gets it again from where it came.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

from fedtide.coordinator.launch.local import RUN_FOLDERS
from fedtide.coordinator.log.engine import Engine
from fedtide.coordinator.log.reports import DURABLE
from fedtide.coordinator.log.snapshots import Snapshots
from fedtide.coordinator.storage import run_folders
from fedtide.coordinator.storage.retention import Garbage, garbage, largest_holders, needed
from fedtide.fabric.errors import FedtideError
from fedtide.fabric.nats.broker import Broker
from fedtide.fabric.nats.jetstream import StreamState
from fedtide.fabric.nats.subjects import (
    CACHE,
    CHECKPOINTS,
    CONTROL,
    DOWN,
    EVENTS,
    HUB_REGION,
    ORDERS,
    PARKED,
    RELEASES,
    STAY,
    UP,
    Subjects,
    reply_consumer,
    up_stream,
)

log = logging.getLogger(__name__)

LOOK_EVERY_S, TRIM_EVERY_S, SWEEP_EVERY_S, SWEEP_AGAIN_S = 15.0, 300.0, 3600.0, 60.0
SETTLED_S = 900.0
"""What was read stays for so long, unless room is short."""
UNUSED_FOR = timedelta(days=1)
"""A blob that nobody names yet may be about to be named: for so long after it was stored it stays."""
LEAST_RESERVE, EVENT_OVERHEAD = 16 << 20, 2.0
"""Bytes of the log that reports never take (more than a batch of events), and what a report may grow to as an event."""
LONG_AGO = datetime.min.replace(tzinfo=UTC)
SHORT, ALARMING, FULL = 0.75, 0.8, 0.95
"""How full a stream is when it is swept at once; when people are told; and when the log keeps the rest for people."""


@dataclass(frozen=True, slots=True)
class Place:
    """A stream of the hub (`region` is HUB_REGION) or of a region's server."""

    region: str
    stream: str

    @property
    def domain(self) -> str | None:
        return None if self.region == HUB_REGION else self.region

    @property
    def makes_room(self) -> bool:
        """Whether it deletes the oldest by itself: it may well be full."""
        return self.stream == PARKED

    def __str__(self) -> str:
        return f"{self.region}/{self.stream}"


@dataclass(slots=True)
class _Floor:
    """Positions, each with the time at which it was seen, oldest first."""

    seen: deque[tuple[float, int]] = field(default_factory=deque)

    def settled(self, now: float, position: int, *, delay_s: float) -> int:
        """Remember a position; the newest of those that are old enough."""
        self.seen.append((now, position))
        found = 0
        while self.seen and self.seen[0][0] <= now - delay_s:
            found = self.seen.popleft()[1]
        return found


class Housekeeping:
    """`levels`: how full each stream was when it was looked at last."""

    def __init__(
        self,
        broker: Broker,
        subjects: Subjects,
        engine: Engine,
        regions: Sequence[str],
        data_dir: Path,
        leads: Callable[[], Awaitable[None]],
        unserved: Mapping[str, str],
        *,
        members_only: bool,
    ) -> None:
        """
        Args:
            leads: returns once it is certain that this process still leads: a successor's runs are none of its world.
            unserved: regions that cannot take part, and why; it changes.
            members_only: nodes have identities, and what others have sent goes.
        """
        self._unserved = unserved
        self._leads = leads
        self._broker = broker
        self._subjects = subjects
        self._engine = engine
        self._regions = regions
        self._run_folders = data_dir / RUN_FOLDERS
        self._members_only = members_only
        self.levels: dict[Place, StreamState] = {}
        self._floors: dict[tuple[str, str], _Floor] = {}
        self._log_has_room = asyncio.Event()
        self._log_has_room.set()
        self._left_for_reports = float("inf")
        self._just_uploaded: dict[str, datetime] = {}

    def stored_bytes(self) -> dict[str, int]:
        """What each region's streams held when they were looked at last; the hub's under an empty name."""
        found: dict[str, int] = {}
        for place, state in self.levels.items():
            region = "" if place.region == HUB_REGION else place.region
            found[region] = found.get(region, 0) + state.bytes
        return found

    def uploaded(self, digest: str) -> None:
        """Somebody has just stored a bundle, or found it stored, and is about to name it."""
        now = datetime.now(UTC)
        recent = {each: at for each, at in self._just_uploaded.items() if now - at < UNUSED_FOR}
        self._just_uploaded = {**recent, digest: now}

    @property
    def log_is_full(self) -> bool:
        """Whether the rest of the log is kept for what people ask: to cancel, to revoke, to roll back."""
        return not self._log_has_room.is_set()

    async def until_log_has_room(self, size_bytes: int) -> None:
        """Before a report of so many bytes is taken in: what is on its way counts, not only what was seen stored."""
        await self._log_has_room.wait()
        self._left_for_reports -= EVENT_OVERHEAD * size_bytes
        if self._left_for_reports < 0:
            self._log_has_room.clear()

    def warnings(self) -> list[str]:
        """What a person should know, fullest first."""
        full = sorted(self._fuller_than(ALARMING).items(), key=lambda each: -each[1].fill)
        fills = [f"{place} is {state.fill:.0%} full" for place, state in full]
        return [*(f"region {region} is not served: {reason}" for region, reason in self._unserved.items()), *fills]

    def _fuller_than(self, fill: float) -> dict[Place, StreamState]:
        return {place: state for place, state in self.levels.items() if state.fill >= fill and not place.makes_room}

    async def run(self) -> None:
        """For ever: look, trim, sweep; at once where room is short."""
        clock = asyncio.get_running_loop().time
        trimmed = swept = clock()
        while True:
            await asyncio.sleep(LOOK_EVERY_S)
            await self.look()
            short = self._fuller_than(SHORT)
            if short or clock() - trimmed >= TRIM_EVERY_S:
                await self.trim({place.region for place in short})
                trimmed = clock()
            if clock() - swept >= (SWEEP_AGAIN_S if short else SWEEP_EVERY_S):
                for place, each in await self.sweep():
                    log.info("storage.swept", extra={"place": str(place), "what": each.pattern, "reason": each.reason})
                swept = clock()

    def _places(self, region: str) -> list[Place]:
        at_hub = (EVENTS, CONTROL, PARKED, ORDERS, DOWN, RELEASES, CHECKPOINTS, UP, *map(up_stream, self._regions))
        in_region = (ORDERS, DOWN, CACHE, UP, STAY)
        return [Place(region, stream) for stream in (at_hub if region == HUB_REGION else in_region)]

    async def look(self) -> None:
        """Read how full each stream is; of a region that is away, what was seen last stays."""
        # The hub's first: whether the log has room must not wait for regions that are away.
        await self._look_at(HUB_REGION)
        self._see_to_the_log()
        await asyncio.gather(*map(self._look_at, self._regions))

    async def _look_at(self, region: str) -> None:
        for place in self._places(region):
            try:
                state = await self._broker.state_of(place.stream, domain=place.domain)
            except FedtideError as exc:
                log.debug("storage.not_seen", extra={"place": str(place), "reason": str(exc)})
                return
            before = self.levels.get(place)
            if state.fill >= ALARMING and not place.makes_room and (before is None or before.fill < ALARMING):
                log.warning("storage.fills", extra={"place": str(place), "bytes": state.bytes, "of": state.max_bytes})
            self.levels[place] = state

    def _see_to_the_log(self) -> None:
        events = self.levels.get(Place(HUB_REGION, EVENTS))
        if events is None or events.max_bytes <= 0:
            return
        reserve = max((1 - FULL) * events.max_bytes, min(LEAST_RESERVE, 0.5 * events.max_bytes))
        self._left_for_reports = events.max_bytes - reserve - events.bytes
        if self._left_for_reports > 0:
            self._log_has_room.set()
        else:
            self._log_has_room.clear()

    async def trim(self, short: Iterable[str] = ()) -> None:
        """Delete reports and replies that were read; in regions, those that the hub has.

        Args:
            short: regions (or the hub) that need the room now.
        """
        now, hurried = asyncio.get_running_loop().time(), set(short)
        readers = {reply_consumer(run) for run, _ in self._engine.world.active_runs()} | {DURABLE, ""}
        self._floors = {key: floor for key, floor in self._floors.items() if key[1] in readers}
        for region in (HUB_REGION, *self._regions):
            try:
                await self._trim_at_hub(region, now, hurried)
                if region != HUB_REGION:
                    await self._trim_in_region(region, now, hurried)
            except FedtideError as exc:
                log.info("storage.not_trimmed", extra={"region": region, "reason": str(exc)})

    async def _trim_at_hub(self, region: str, now: float, hurried: set[str]) -> None:
        stream, delay = up_stream(region), 0.0 if HUB_REGION in hurried else SETTLED_S
        readers = {DURABLE: self._subjects.reports_of(region)}
        if region != HUB_REGION:
            active = [run for run, _ in self._engine.world.active_runs()]
            readers |= {reply_consumer(run): self._subjects.replies(region, run) for run in active}
        for durable, pattern in readers.items():
            floor = await self._broker.floor(stream, durable)
            if floor is not None:
                read = self._floor(stream, durable).settled(now, floor - 1, delay_s=delay)
                await self._purge_up_to(stream, pattern, None, read)

    async def _trim_in_region(self, region: str, now: float, hurried: set[str]) -> None:
        newest = await self._broker.last_under(up_stream(region), self._subjects.all_up(region))
        if newest is None:
            return
        if (await self._broker.state_of(UP, domain=region)).created > newest.stored_at:
            return  # the region's store was lost: the hub has nothing of what is in it
        delay = 0.0 if region in hurried else SETTLED_S
        collected = self._floor(region, "").settled(now, newest.sequence_at_source, delay_s=delay)
        for pattern in (self._subjects.reports_of(region), self._subjects.replies_of(region)):
            await self._purge_up_to(UP, pattern, region, collected)

    def _floor(self, where: str, reader: str) -> _Floor:
        return self._floors.setdefault((where, reader), _Floor())

    async def _purge_up_to(self, stream: str, pattern: str, domain: str | None, sequence: int) -> None:
        if sequence > 0:
            await self._broker.purge(stream, pattern, domain=domain, up_to=sequence)

    async def sweep(self, *, dry_run: bool = False, unused_for: timedelta = UNUSED_FOR) -> list[tuple[Place, Garbage]]:
        """Delete what nobody needs here, at the hub and in every region that can be reached; what it was.

        Args:
            unused_for: blobs that nobody names yet stay for so long after they were stored.
        """
        found: list[tuple[Place, Garbage]] = []
        active = {run for run, _ in self._engine.world.active_runs()}
        for folder in await asyncio.to_thread(run_folders.forgotten, self._run_folders, active):
            if not dry_run:
                await asyncio.to_thread(run_folders.delete, folder)
            found.append(
                (Place(HUB_REGION, "coordinator"), Garbage(str(folder), f"of run {folder.name}, which is over", 0))
            )
        for region in (HUB_REGION, *self._regions):
            try:
                async for place, each in self._garbage_of(region, unused_for):
                    if not dry_run:
                        await self._delete(place, each)
                    found.append((place, each))
            except FedtideError as exc:
                log.info("storage.not_swept", extra={"region": region, "reason": str(exc)})
        if found and not dry_run:
            await self.look()
        return found

    async def _delete(self, place: Place, each: Garbage) -> None:
        if each.pattern == ">":
            await self._broker.delete_stream(place.stream, domain=place.domain)
        else:
            await self._broker.purge(place.stream, each.pattern, domain=place.domain)

    async def _garbage_of(self, region: str, unused_for: timedelta) -> AsyncIterator[tuple[Place, Garbage]]:
        streams: Sequence[str] = (DOWN, ORDERS, UP, STAY)
        if region == HUB_REGION:
            streams = (DOWN, ORDERS, RELEASES, CHECKPOINTS, CONTROL, UP, *map(up_stream, self._regions))
        for stream in streams:
            place = Place(region, stream)
            pattern = f"{self._subjects.root}.ctl.blob.>" if stream == CONTROL else ">"
            stored = await self._broker.messages_by_subject(stream, pattern, domain=place.domain)
            # After the listing: what is stored meanwhile is not in it, and what is named meanwhile is kept.
            await self._leads()
            snapshot = await Snapshots(self._broker, self._subjects).stored()
            needs = needed(self._engine.world, datetime.now(UTC), snapshot, members_only=self._members_only)
            for each in garbage(stored, needs):
                if not each.digest or await self._is_unused(place, each, unused_for):
                    yield place, each
        if region == HUB_REGION:
            for stream in await self._of_gone_regions():
                yield Place(HUB_REGION, stream), Garbage(">", "of a region that was removed", 0)

    async def _of_gone_regions(self) -> list[str]:
        """The hub's streams of regions that are neither configured nor known."""
        world = self._engine.world
        known = {*self._regions, *world.identities.regions, *(node.region for node in world.nodes.values())}
        kept = {up_stream(region) for region in known}
        there = await self._broker.stream_names()
        return [name for name in there if name.startswith(f"{UP}_") and name not in kept]

    async def _is_unused(self, place: Place, each: Garbage, unused_for: timedelta) -> bool:
        """Whether a blob that nobody names was stored so long ago that nobody is about to."""
        now = datetime.now(UTC)
        if now - self._just_uploaded.get(each.digest, LONG_AGO) < unused_for:
            return False
        newest = await self._broker.last_under(place.stream, each.pattern, domain=place.domain)
        return newest is not None and now - newest.stored_at >= unused_for

    async def holders(self, place: Place) -> list[tuple[str, int]]:
        """Who has the most messages in a stream of what comes up."""
        if not place.stream.startswith(UP) and place.stream != STAY:
            return []
        counts = await self._broker.messages_by_subject(place.stream, ">", domain=place.domain)
        return largest_holders(counts.items())
