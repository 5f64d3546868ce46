"""Creates the streams of hub and regions, and keeps trying for regions that are not there yet."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from datetime import UTC, datetime, timedelta
from functools import partial

from fedtide.fabric.errors import FedtideError, StoreFull
from fedtide.fabric.nats.broker import Broker
from fedtide.fabric.nats.compare_and_set import replace_stored
from fedtide.fabric.nats.jetstream import StreamState
from fedtide.fabric.nats.streams import (
    EPOCH,
    LARGEST_ROOM,
    MIRRORED,
    SMALLEST_ROOM,
    Config,
    hub_streams,
    leaf_streams,
    mirror_consumer,
    mirror_consumer_config,
    region_stream,
)
from fedtide.fabric.nats.subjects import DOWN, ORDERS, Subjects
from fedtide.fabric.process.retry import Backoff, until_done

log = logging.getLogger(__name__)

REFUSED_AGAIN_S = 60.0
SHRINK, HEADROOM = 0.9, 1.1
"""By how much less room is tried at a time; and how much more than it holds a stream may hold at least."""
NOT_JOINED = "its servers have not joined (fedtide fleet region; the edge chart)"
AWAY = "its servers do not answer"
SMALLEST_TRIAL = 1 << 20
SETTLES = timedelta(seconds=12)
"""So late servers of a cluster tell each other how much room each has given away."""


class Topology:
    """The streams of one tenant. Regions may come at any time and in any order.

    If a mirror or source is made before its link is up, nats-server tries again only after half a
    minute. So a region's streams are made through the hub, which shows that the link is up,
    and only then does the hub collect from the region.

    How much room a server's store has, it says to nobody but by refusing streams that would have more than that: the
    largest room that it takes is found by trying.
    """

    def __init__(self, broker: Broker, subjects: Subjects, regions: Sequence[str], replicas: int = 1) -> None:
        self._replicas = replicas
        self._regions = regions
        self._broker = broker
        self._subjects = subjects
        self._rooms: dict[str | None, int] = {}
        self._joined: set[str] = set()
        self.unserved: dict[str, str] = {}
        """Regions that cannot take part yet, and why."""
        self.epoch = ""
        """Which log the hub has; to be set before regions are looked after."""
        self.quota: int | None = None
        """What these streams may have in all at the hub, in bytes of each server; None: all there is."""
        self.set_aside: Callable[[int], Awaitable[int]] | None = None
        """Of the hub's store, for others, in bytes; of what these streams have reserved. To be set before they are."""

    def _of_hub(self, room: int) -> list[Config]:
        count = len(self._regions)
        return [
            *hub_streams(self._subjects, self._replicas, room=room, regions=count),
            *(self._region_stream(region, room, sourced=True) for region in self._regions),
        ]

    def _region_stream(self, region: str, room: int, *, sourced: bool) -> Config:
        return region_stream(
            self._subjects, region, sourced=sourced, replicas=self._replicas, room=room, regions=len(self._regions)
        )

    async def create_missing(self) -> None:
        """Create the hub's streams if they are missing, small; a standby may do no more than that."""
        for config in self._of_hub(SMALLEST_ROOM):
            try:
                await self._broker.ensure_stream(config, update=False)
            except FedtideError as exc:
                # Another layout, or no room beside the old limits: whoever leads changes these first.
                log.info("topology.left_to_leader", extra={"stream": config["name"], "reason": str(exc)})

    async def ensure_hub(self) -> None:
        """Create or update the hub's streams; what is collected from regions goes on."""
        await self._fit(None, self._of_hub)
        for subject in sorted(await self._broker.subjects_of(DOWN, self._subjects.all_desired)):
            found = await self._broker.last(DOWN, subject)  # of a version that had one stream for both
            if found is not None:
                await replace_stored(self._broker, ORDERS, subject, found.data, lambda _: False)
            await self._broker.purge(DOWN, subject)

    async def fit_hub_again(self) -> None:
        """Give room away, or take what is free again: others need more now, or less."""
        self._rooms.pop(None, None)
        await self._fit(None, self._of_hub)

    async def _fit(self, domain: str | None, configs: Callable[[int], list[Config]]) -> None:
        """Bring streams to limits that use what the server's store has.

        Raises:
            StoreFull: a stream is missing, and there is not even the smallest room for it.
        """
        if domain not in self._rooms:
            self._rooms[domain] = await until_done(
                log, "topology.waits", lambda: self._find_room(domain, configs(SMALLEST_ROOM)), domain=domain
            )
        room = self._rooms[domain]
        now = await until_done(log, "topology.waits", lambda: self._states(domain, configs(room)), domain=domain)
        wanted = {name: _with_what_it_holds(each, now.get(name)) for name, each in _by_name(configs(room)).items()}
        # What is there comes first: it may have what is new (subjects, room); and what becomes smaller before the rest.
        order = sorted(wanted, key=lambda name: (name not in now, _limit(wanted[name]) - _reserved(now.get(name))))
        for name in order:
            if not await self._until_ensured(wanted[name], domain):
                log.error("topology.store_too_small", extra={"domain": domain or "hub", "stream": name})
                small = _by_name(configs(SMALLEST_ROOM))[name]
                await self._broker.ensure_stream(small, domain=domain, update=False)

    async def _find_room(self, domain: str | None, configs: list[Config]) -> int:
        """What the streams have already, and the largest stream that the server would make beside them."""
        states = await self._states(domain, configs)
        if self._replicas > 1 and any(datetime.now(UTC) - each.created < SETTLES for each in states.values()):
            await asyncio.sleep(SETTLES.total_seconds())
        has, room = sum(_reserved(state) for state in states.values()), LARGEST_ROOM
        trial: Config = {"name": "ROOM", "subjects": [f"{self._subjects.root}.room"], "storage": "file"}
        if domain is None and self._replicas > 1:
            trial["num_replicas"] = self._replicas
        while room >= SMALLEST_TRIAL:
            try:
                await self._broker.ensure_stream({**trial, "max_bytes": room}, domain=domain)
            except StoreFull:
                room = int(room * SHRINK)
                continue
            await self._broker.delete_stream("ROOM", domain=domain)
            break
        else:
            room = 0
        aside = await self.set_aside(has) if domain is None and self.set_aside is not None else 0
        found = has + room - aside
        if domain is None and self.quota is not None:
            found = min(found, self.quota)
        log.info("topology.room", extra={"domain": domain or "hub", "bytes": found})
        return max(SMALLEST_ROOM, found)

    async def _states(self, domain: str | None, configs: list[Config]) -> dict[str, StreamState]:
        """Of those streams that are there, by name."""
        there = [name for name in _by_name(configs) if await self._broker.has_stream(name, domain=domain)]
        return {name: await self._broker.state_of(name, domain=domain) for name in there}

    async def keep_region(self, region: str, look_again: asyncio.Event) -> None:
        """As `ensure_region`, now and whenever `look_again` is set, for ever.

        A region whose streams are refused is tried again, and holds up no other.
        """
        backoff = Backoff(cap_s=REFUSED_AGAIN_S)
        while True:
            look_again.clear()
            self.unserved.setdefault(region, AWAY if region in self._joined else NOT_JOINED)
            try:
                await self.ensure_region(region)
            except FedtideError as exc:
                self.unserved[region] = str(exc)
                log.error("region.refused", extra={"region": region, "reason": str(exc)})
                await backoff.wait()
            else:
                self.unserved.pop(region, None)
                self._joined.add(region)
                backoff.reset()
                await look_again.wait()

    async def ensure_region(self, region: str) -> None:
        """Create a region's streams as soon as it can be reached, and collect from it.

        A source that the hub has already is removed and added again: a hub that was away would wait for
        its next try otherwise. The messages from a source carry its position: none is lost or doubled.
        """
        for stream in MIRRORED:
            await until_done(log, "topology.waits", partial(self._prepare_mirror, region, stream), domain=region)
        await self._fit(region, partial(leaf_streams, self._subjects, region, epoch=self.epoch))
        for sourced in (False, True):
            config = self._region_stream(region, self._rooms.get(None, SMALLEST_ROOM), sourced=sourced)
            if not await self._until_ensured(config, None):
                raise StoreFull(f"the hub has no room for what comes up from {region}", "Enlarge its store")
        log.info("region.ready", extra={"region": region})

    async def _prepare_mirror(self, region: str, stream: str) -> None:
        """Make the consumer that a region's mirror reads; a mirror that is new reads from the beginning."""
        wanted = mirror_consumer_config(self._subjects, region, stream)
        told = await self._broker.metadata_of(stream, domain=region)
        if told is not None and told.get(EPOCH, self.epoch) != self.epoch:
            log.warning("topology.mirror_of_another_log", extra={"region": region, "stream": stream})
            await self._broker.delete_stream(stream, domain=region)
            told = None
        if told is None:
            await self._broker.delete_consumer(stream, mirror_consumer(region))
        await self._broker.ensure_consumer(stream, wanted)

    async def _until_ensured(self, config: Config, domain: str | None) -> bool:
        """Whether there was room for a stream as `config` says."""
        stream = config["name"]
        # A cluster says late what was given back; a region is one server.
        give_up_at = asyncio.get_running_loop().time() + (2 * SETTLES.total_seconds() if self._replicas > 1 else 0)

        async def ensure() -> bool:
            try:
                await self._broker.ensure_stream(config, domain=domain)
            except StoreFull:
                if domain is None and asyncio.get_running_loop().time() < give_up_at:
                    raise
                return False
            return True

        try:
            return await until_done(log, "topology.waits", ensure, stream=stream, domain=domain)
        except FedtideError as exc:
            log.error("topology.refused", extra={"stream": stream, "domain": domain, "reason": str(exc)})
            raise


def _by_name(configs: list[Config]) -> dict[str, Config]:
    return {str(config["name"]): config for config in configs}


def _with_what_it_holds(config: Config, state: StreamState | None) -> Config:
    """A stream that holds more than its share keeps that, and a little more."""
    least = int(HEADROOM * state.bytes) if state is not None else 0
    return {**config, "max_bytes": max(_limit(config), least)}


def _limit(config: Config) -> int:
    found = config["max_bytes"]
    assert isinstance(found, int)
    return found


def _reserved(state: StreamState | None) -> int:
    return max(0, state.max_bytes) if state is not None else 0
