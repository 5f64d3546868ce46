"""Streams that have to be made anew: of a region that lost its store, of an older version, of three servers."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from fedtide.console.embedded.plan import free_ports
from fedtide.coordinator.adapters.topology import Topology as Streams
from fedtide.coordinator.log.engine import Engine
from fedtide.coordinator.log.event_log import EventLog
from fedtide.coordinator.log.snapshots import Snapshots
from fedtide.coordinator.storage.housekeeping import Housekeeping
from fedtide.fabric.nats.broker import Broker
from fedtide.fabric.nats.subjects import DOWN, EVENTS, ORDERS, UP, Subjects, up_stream
from tests.conftest import NatsServer, Topology

SUBJECTS = Subjects()


async def leads() -> None:
    """Nobody else does."""


async def until_collected(hub: Broker, subject: str) -> None:
    async with asyncio.timeout(40):
        while subject not in await hub.subjects_of(up_stream("eu"), ">"):  # noqa: ASYNC110 - nothing tells
            await asyncio.sleep(0.05)


async def test_what_a_new_store_holds_is_collected_from_its_beginning(
    topology: Topology, at_hub: Broker, tmp_path: Path
) -> None:
    def report(name: str) -> str:
        return SUBJECTS.report("eu", "n1", name)

    at_leaf = await Broker.connect(topology.leaf.url, "test")
    for number in range(5):
        await at_leaf.publish(report(f"old-{number}"), b"x")
    await until_collected(at_hub, report("old-4"))
    await at_leaf.close()
    topology.leaf.kill()
    shutil.rmtree(tmp_path / "eu")
    topology.leaf.start()
    streams = Streams(at_hub, SUBJECTS, ["eu"])
    await streams.ensure_hub()
    async with asyncio.timeout(60):
        await streams.ensure_region("eu")
    at_leaf = await Broker.connect(topology.leaf.url, "test")
    engine = Engine(at_hub, SUBJECTS, EventLog(at_hub, SUBJECTS), Snapshots(at_hub, SUBJECTS))
    keeping = Housekeeping(at_hub, SUBJECTS, engine, ["eu"], tmp_path, leads, {}, members_only=False)
    for number in range(8):
        await at_leaf.publish(report(f"new-{number}"), b"y")
        await keeping.trim({"eu"})
    await until_collected(at_hub, report("new-7"))
    assert await at_hub.subjects_of(up_stream("eu"), ">") >= {report(f"new-{number}") for number in range(8)}
    await keeping.trim({"eu"})
    assert await at_hub.subjects_of(UP, ">", domain="eu") == frozenset(), "now the hub has them"
    await at_leaf.close()


async def test_orders_of_a_version_that_had_one_stream_for_all_move(hub: NatsServer) -> None:
    broker = await Broker.connect(hub.url, "test")
    before = {"storage": "file", "max_msgs_per_subject": 1, "allow_direct": True, "allow_msg_ttl": True}
    await broker.ensure_stream({"name": DOWN, "subjects": [f"{SUBJECTS.root}.down.>"], **before})
    order, task = SUBJECTS.desired("eu", "n1", "m"), SUBJECTS.task("eu", "n1", "run-1", "t")
    for subject in (order, task):
        await broker.publish(subject, b"told before")
    streams = Streams(broker, SUBJECTS, ["eu"])
    await streams.create_missing()
    await streams.ensure_hub()
    assert await broker.subjects_of(DOWN, ">") == {task} and await broker.subjects_of(ORDERS, ">") == {order}
    await streams.ensure_hub()
    found = await broker.last(ORDERS, order)
    assert found is not None and found.data == b"told before"
    await broker.close()


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[str]:
    """Three servers of 100 MB each."""
    with ExitStack() as ending:
        clients, routes = free_ports(3), free_ports(3)
        for number, (port, route) in enumerate(zip(clients, routes, strict=True)):
            config = tmp_path / f"s{number}.conf"
            others = ", ".join(f'"nats-route://127.0.0.1:{each}"' for each in routes)
            config.write_text(
                f"server_name: s{number}\nlisten: 127.0.0.1:{port}\nmax_payload: 8MB\n"
                f'jetstream {{ store_dir: "{tmp_path}/s{number}", domain: hub, max_file: 100MB }}\n'
                f"cluster {{ name: hub, listen: 127.0.0.1:{route}, routes: [{others}] }}\n"
            )
            server = NatsServer(config, port)
            ending.callback(server.kill)
            server.start()
        yield f"nats://127.0.0.1:{clients[0]}"


@pytest.mark.slow
async def test_a_hub_of_three_servers_has_room_for_every_stream_too(cluster: str) -> None:
    hub = await Broker.connect(cluster, "test")
    streams = Streams(hub, SUBJECTS, ["eu"], replicas=3)
    async with asyncio.timeout(60):
        await streams.create_missing()
        await streams.ensure_hub()
    state = await hub.state_of(EVENTS)
    assert 10e6 < state.max_bytes <= 21e6, "a fifth of what there is"
    await hub.publish(SUBJECTS.event("run", "requested"), b"logged")
    await hub.close()
