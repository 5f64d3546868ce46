"""Streams of regions: one whose streams are refused holds up nobody."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

import pytest

from fedtide.coordinator.adapters.topology import NOT_JOINED, Topology
from fedtide.fabric.errors import TransientError
from fedtide.fabric.nats.jetstream import ApiError
from fedtide.fabric.nats.streams import hub_streams
from fedtide.fabric.nats.subjects import STAY, Subjects
from tests.shell.fake_broker import FakeBroker, FakeNats

pytestmark = pytest.mark.looptime


class Refusing(FakeBroker):
    """Refuses what a region needs until it is told better."""

    def __init__(self, server: FakeNats) -> None:
        super().__init__(server)
        self.refuses = True
        self.asked = 0

    async def ensure_stream(
        self, config: Mapping[str, object], *, domain: str | None = None, update: bool = True
    ) -> None:
        if domain == "eu":
            self.asked += 1
            if self.refuses:
                raise ApiError(10052, "bad configuration")
        await super().ensure_stream(config, domain=domain, update=update)

    async def sourced_domains(self, stream: str) -> frozenset[str]:
        return frozenset()


async def test_a_region_whose_streams_are_refused_is_tried_again_and_the_others_go_on() -> None:
    server = FakeNats()
    broker = Refusing(server)
    for config in hub_streams(Subjects()):
        await broker.ensure_stream(config)
    topology = Topology(broker, Subjects(), ["eu", "us"])
    assert not topology.unserved
    refused = asyncio.create_task(topology.keep_region("eu", asyncio.Event()))
    other = asyncio.create_task(topology.keep_region("us", asyncio.Event()))
    await asyncio.sleep(600)
    assert list(topology.unserved) == ["eu"] and "bad configuration" in topology.unserved["eu"]
    assert not refused.done() and 5 < broker.asked < 30
    assert server.streams.keys() >= {STAY}, "the other region's streams are there"
    broker.refuses = False
    asked = broker.asked
    await asyncio.sleep(600)
    assert broker.asked > asked and not refused.done() and not topology.unserved
    asked = broker.asked
    await asyncio.sleep(600)
    assert broker.asked == asked, "what is there is left alone"
    for task in (refused, other):
        task.cancel()


class Away(FakeBroker):
    """Its region has no server yet."""

    is_away = True

    async def metadata_of(self, stream: str, *, domain: str | None = None) -> dict[str, str] | None:
        if self.is_away and domain is not None:
            raise TransientError("no responders")
        return await super().metadata_of(stream, domain=domain)


async def test_a_region_that_has_not_joined_is_named_until_it_has() -> None:
    broker = Away(FakeNats())
    for config in hub_streams(Subjects()):
        await broker.ensure_stream(config)
    topology = Topology(broker, Subjects(), ["eu"])
    keeping = asyncio.create_task(topology.keep_region("eu", asyncio.Event()))
    await asyncio.sleep(60)
    assert topology.unserved == {"eu": NOT_JOINED}
    broker.is_away = False
    await asyncio.sleep(60)
    assert not topology.unserved
    keeping.cancel()
