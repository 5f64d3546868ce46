"""Stores that are full: control goes on, nothing is lost, and there is room again when what nobody needs is gone."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest

from fedtide.console.embedded import nats_config
from fedtide.console.embedded.plan import free_ports
from fedtide.coordinator.adapters.topology import Topology
from fedtide.coordinator.log.engine import Engine
from fedtide.coordinator.log.event_log import EventLog
from fedtide.coordinator.log.snapshots import Snapshots
from fedtide.coordinator.storage.housekeeping import Housekeeping, Place
from fedtide.fabric.errors import StoreFull
from fedtide.fabric.events.envelope import CoordinatorElected
from fedtide.fabric.nats.broker import Broker
from fedtide.fabric.nats.compare_and_set import replace_stored
from fedtide.fabric.nats.subjects import DOWN, ORDERS, UP, Subjects, up_stream
from fedtide.fabric.nats.transfer import put_blob
from tests.conftest import NatsServer
from tests.scenarios.build import joined, requested

SUBJECTS = Subjects()
SMALL = nats_config.Store(room="60MB")


@dataclass
class Installation:
    """A hub and a region with little room, and the engine and housekeeping of a leader."""

    hub: Broker
    leaf: Broker
    engine: Engine
    housekeeping: Housekeeping


@pytest.fixture
async def small(tmp_path: Path) -> AsyncIterator[Installation]:
    port, leaf_listen, leaf_port = free_ports(3)
    (tmp_path / "hub.conf").write_text(nats_config.hub(port, leaf_listen, tmp_path / "hub", kept=SMALL))
    (tmp_path / "eu.conf").write_text(nats_config.leaf("eu", leaf_port, leaf_listen, tmp_path / "eu", kept=SMALL))
    servers = [NatsServer(tmp_path / "hub.conf", port), NatsServer(tmp_path / "eu.conf", leaf_port)]
    async with AsyncExitStack() as ending:
        for server in servers:
            server.start()
            ending.callback(server.kill)
        hub, leaf = [await Broker.connect(server.url, "test") for server in servers]
        ending.push_async_callback(hub.close)
        ending.push_async_callback(leaf.close)
        streams = Topology(hub, SUBJECTS, ["eu"])
        await streams.create_missing()
        engine = Engine(hub, SUBJECTS, EventLog(hub, SUBJECTS), Snapshots(hub, SUBJECTS))
        await engine.take_over(CoordinatorElected(name="one"))
        await streams.ensure_hub()
        async with asyncio.timeout(30):
            await streams.ensure_region("eu")
        ending.callback(asyncio.create_task(engine.run()).cancel)
        housekeeping = Housekeeping(hub, SUBJECTS, engine, ["eu"], tmp_path, leads, {}, members_only=False)
        yield Installation(hub, leaf, engine, housekeeping)


async def leads() -> None:
    """Nobody else does."""


async def until_full(broker: Broker, prefix: str) -> int:
    """Publish until there is no room; how many messages there was room for."""
    for number in range(100):
        try:
            await broker.publish(f"{prefix}.{number}", os.urandom(1_000_000))
        except StoreFull:
            return number
    raise AssertionError("there is no end to the room")


async def until_collected(hub: Broker, count: int) -> None:
    """Nothing tells when the hub has so many messages of the region."""
    async with asyncio.timeout(30):
        while await hub.last_sequence(up_stream("eu")) < count:  # noqa: ASYNC110
            await asyncio.sleep(0.01)


async def test_room_is_found_by_trying_and_shared(small: Installation) -> None:
    await small.housekeeping.look()
    at_hub = [state.max_bytes for place, state in small.housekeeping.levels.items() if place.region == "hub"]
    assert all(size > 0 for size in at_hub) and 30e6 < sum(at_hub) <= 60e6


async def test_bundles_that_fill_their_stream_hinder_neither_the_log_nor_orders(small: Installation) -> None:
    assert await until_full(small.hub, SUBJECTS.blob("f" * 64)) >= 4
    with pytest.raises(StoreFull, match="maximum bytes exceeded"):
        await put_blob(small.hub, SUBJECTS.blob, DOWN, [os.urandom(2_000_000)], ttl_s=None)
    await small.engine.submit(joined("n1"))
    await small.engine.submit(requested())
    order = SUBJECTS.desired("eu", "n1", "m")
    for state in (b"offer", b"roll back, " + b"x" * 1000):
        await replace_stored(small.hub, ORDERS, order, state, lambda _: True)
    async with asyncio.timeout(20):
        while (found := await small.leaf.last(ORDERS, order)) is None or found.data == b"offer":  # noqa: ASYNC110
            await asyncio.sleep(0.01)


async def test_a_region_that_is_full_goes_on_where_it_stopped_when_there_is_room(small: Installation) -> None:
    await small.engine.submit(requested())
    sent = await until_full(small.leaf, SUBJECTS.update_blob("eu", "n1", "run-1", "d" * 64))
    assert sent >= 6, "the region has more room for what comes up than the hub has for it"
    report = SUBJECTS.report("eu", "n2", "joined")
    with pytest.raises(StoreFull):
        await small.leaf.publish(report, b"x" * 1_000_000)
    await small.housekeeping.look()
    assert small.housekeeping.levels[Place("eu", UP)].fill > 0.75
    assert await small.housekeeping.holders(Place("eu", UP)) == [("n1", sent)]
    assert any("full" in each for each in small.housekeeping.warnings())
    assert await small.housekeeping.sweep(dry_run=True) == [], "the run is active: all of it is needed"

    await until_collected(small.hub, 2)
    assert await small.hub.last_sequence(up_stream("eu")) < sent, "the hub's own stream is full, and collects no more"
    while (before := await small.hub.last_sequence(up_stream("eu"))) < sent:
        await small.hub.purge(up_stream("eu"), SUBJECTS.update_blobs("eu", "run-1"))
        await until_collected(small.hub, before + 1)


async def test_what_nobody_needs_is_swept_at_the_hub_and_in_its_regions(small: Installation) -> None:
    await until_full(small.leaf, SUBJECTS.update_blob("eu", "evil", "no-run", "d" * 64))
    await small.hub.publish(SUBJECTS.checkpoint("no-run", "head"), b"head")
    await until_collected(small.hub, 1)
    planned = await small.housekeeping.sweep(dry_run=True)
    assert {(place.region, place.stream) for place, _ in planned} == {
        ("hub", "CHECKPOINTS"),
        ("hub", "UP_eu"),
        ("eu", "UP"),
    }
    assert await small.housekeeping.sweep() and await small.hub.subjects_of(UP, ">", domain="eu") == frozenset()
    await small.leaf.publish(SUBJECTS.report("eu", "n2", "joined"), b"honest")


async def test_reports_go_once_the_coordinator_has_them_and_not_before(small: Installation) -> None:
    for number in range(3):
        await small.leaf.publish(SUBJECTS.report("eu", "n1", f"kind-{number}"), b"report")
    stream, pattern = up_stream("eu"), SUBJECTS.reports_of("eu")
    await until_collected(small.hub, 3)
    await small.housekeeping.trim({"eu", "hub"})
    assert len(await small.hub.subjects_of(stream, pattern)) == 3, "nobody has read them"
    assert await small.hub.subjects_of(UP, pattern, domain="eu") == frozenset(), "the hub has them"
    reading = small.hub.consume(stream, "coordinator", pattern)
    await (await anext(reading)).ack()
    await (await anext(reading)).ack()
    async with asyncio.timeout(20):
        while await small.hub.floor(stream, "coordinator") != 3:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    await small.housekeeping.trim()
    assert len(await small.hub.subjects_of(stream, pattern)) == 3, "not before some minutes have passed"
    await small.housekeeping.trim({"hub"})
    assert await small.hub.subjects_of(stream, pattern) == {SUBJECTS.report("eu", "n1", "kind-2")}
    await reading.aclose()
