"""Heartbeats in, `node.online` and `node.offline` out; an hour of them takes no time here."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from fedtide.coordinator.adapters.presence import MISSED_BEATS, Presence
from fedtide.coordinator.log.engine import Engine
from fedtide.coordinator.log.event_log import EventLog
from fedtide.coordinator.log.snapshots import Snapshots
from fedtide.fabric.encoding import to_json
from fedtide.fabric.events.envelope import CoordinatorElected
from fedtide.fabric.events.identity import JoinTokenCreated, NodeEnrolled
from fedtide.fabric.messages.heartbeat import Heartbeat
from fedtide.fabric.nats.jetstream import Ack
from fedtide.fabric.nats.subjects import EVENTS, Subjects
from tests.scenarios.build import joined
from tests.shell.fake_broker import FakeBroker, FakeNats

pytestmark = pytest.mark.looptime
SUBJECTS = Subjects()
BEAT_S = 5.0


@asynccontextmanager
async def watched(broker: FakeBroker) -> AsyncIterator[Engine]:
    """A leading engine that has `n1` in its world and watches who is there; made in the test's own time."""
    engine = Engine(broker, SUBJECTS, EventLog(broker, SUBJECTS), Snapshots(broker, SUBJECTS))
    await engine.take_over(CoordinatorElected(name="one"))
    running = asyncio.create_task(engine.run())
    await engine.submit(joined("n1"))
    async with asyncio.TaskGroup() as group:
        await Presence(broker, SUBJECTS, engine, group).start()
        yield engine
        await beat(broker, bye=True)  # no timer stays behind
    running.cancel()


def online(engine: Engine) -> bool:
    return engine.world.nodes["n1"].online


async def beat(broker: FakeBroker, node: str = "n1", **fields: bool | str) -> None:
    await broker.tell(SUBJECTS.telemetry("eu", node), to_json(Heartbeat(heartbeat_s=BEAT_S, **fields)))
    await asyncio.sleep(0.01)


async def test_a_node_that_beats_stays_online_and_nothing_is_logged(broker: FakeBroker) -> None:
    async with watched(broker) as engine:
        await beat(broker)
        before = await broker.last_sequence(EVENTS)
        for _ in range(720):
            await asyncio.sleep(BEAT_S)
            await beat(broker)
        assert online(engine) and await broker.last_sequence(EVENTS) == before


async def test_a_node_that_misses_three_beats_is_offline_until_it_beats_again(broker: FakeBroker) -> None:
    async with watched(broker) as engine:
        await beat(broker)
        await asyncio.sleep(MISSED_BEATS * BEAT_S - 1)
        assert online(engine)
        await asyncio.sleep(2)
        assert not online(engine)
        await beat(broker)
        assert online(engine)


async def test_a_node_that_says_goodbye_is_offline_at_once(broker: FakeBroker) -> None:
    async with watched(broker) as engine:
        await beat(broker, bye=True)
        assert not online(engine)


async def test_a_node_that_the_log_calls_online_and_never_beats_is_offline(broker: FakeBroker) -> None:
    async with watched(broker) as engine:
        await asyncio.sleep(60)
        assert not online(engine)


async def test_a_heartbeat_that_is_none_changes_nothing(broker: FakeBroker) -> None:
    async with watched(broker) as engine:
        await broker.tell(SUBJECTS.telemetry("eu", "n1"), b"\xff")
        await beat(broker)
        assert online(engine)


async def test_a_node_that_joined_and_never_beat_is_offline(broker: FakeBroker) -> None:
    engine = Engine(broker, SUBJECTS, EventLog(broker, SUBJECTS), Snapshots(broker, SUBJECTS))
    await engine.take_over(CoordinatorElected(name="one"))
    running = asyncio.create_task(engine.run())
    async with asyncio.TaskGroup() as group:
        presence = Presence(broker, SUBJECTS, engine, group)
        await presence.start()
        await engine.submit(joined("ghost"))
        presence.changed("ghost")
        await asyncio.sleep(60)
        assert not engine.world.nodes["ghost"].online
    running.cancel()


@pytest.mark.parametrize(("seconds", "offline_after"), [(60.0, 180), (math.nan, 15), (0.0, 15), (1e300, 15)])
async def test_after_a_fail_over_a_node_has_as_long_as_its_heartbeats_take(
    broker: FakeBroker, seconds: float, offline_after: float
) -> None:
    engine = Engine(broker, SUBJECTS, EventLog(broker, SUBJECTS), Snapshots(broker, SUBJECTS))
    await engine.take_over(CoordinatorElected(name="one"))
    running = asyncio.create_task(engine.run())
    await engine.submit(joined("n1", heartbeat_s=seconds))
    async with asyncio.TaskGroup() as group:
        await Presence(broker, SUBJECTS, engine, group).start()
        await asyncio.sleep(offline_after - 1)
        assert online(engine)
        await asyncio.sleep(2)
        assert not online(engine)
    running.cancel()


async def test_while_the_log_waits_a_node_that_is_back_is_told_once(nats: FakeNats, broker: FakeBroker) -> None:
    async with watched(broker) as engine:
        await beat(broker, bye=True)
        before = await broker.last_sequence(EVENTS)
        publish = broker.publish

        async def full(*arguments: Any, **options: Any) -> Ack:
            await asyncio.sleep(500)
            return await publish(*arguments, **options)

        broker.publish = full
        for _ in range(100):
            await beat(broker)
            await asyncio.sleep(1)
        await asyncio.sleep(500)
        assert online(engine) and await broker.last_sequence(EVENTS) == before + 1
        broker.publish = publish


async def test_two_processes_with_one_identity_are_noticed_and_a_restart_is_none(broker: FakeBroker) -> None:
    async with watched(broker) as engine, asyncio.TaskGroup() as group:
        presence = Presence(broker, SUBJECTS, engine, group)
        await presence.start()
        for boot in ("a", "a", "b", "b", "b"):
            await beat(broker, boot=boot)
        assert not presence.twins, "one start follows another"
        await beat(broker, boot="a")
        assert set(presence.twins) == {"n1"}
        await beat(broker, bye=True)


async def test_only_an_enrolled_node_of_that_region_is_heard(broker: FakeBroker) -> None:
    async with watched(broker) as engine, asyncio.TaskGroup() as group:
        presence = Presence(broker, SUBJECTS, engine, group, members_only=True)
        await presence.start()
        await beat(broker)
        assert not presence.heartbeats, "it has no identity"
        expires_at = datetime.now(UTC) + timedelta(days=90)
        await engine.submit(JoinTokenCreated(token="t", key="UT", uses=1, expires_at=expires_at))
        await engine.submit(NodeEnrolled(node="n1", region="eu", key="UA", expires_at=expires_at, token="t"))
        await broker.tell(SUBJECTS.telemetry("us", "n1"), to_json(Heartbeat()))
        await asyncio.sleep(0.01)
        assert not presence.heartbeats, "another region speaks for it"
        await beat(broker)
        assert set(presence.heartbeats) == {"n1"}
        await beat(broker, bye=True)
