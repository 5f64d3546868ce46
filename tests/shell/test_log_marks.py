"""The mark of a log outside of it: who takes over later does not put back what was put back already."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

import pytest

from fedtide.coordinator.log.engine import Engine
from fedtide.coordinator.log.event_log import EventLog
from fedtide.coordinator.log.log_marks import LogGuard, Mark
from fedtide.coordinator.log.snapshots import Snapshots
from fedtide.fabric.errors import LogLost
from fedtide.fabric.events.envelope import CoordinatorElected
from fedtide.fabric.nats.subjects import Subjects
from tests.shell.fake_broker import FakeBroker, FakeNats

SUBJECTS = Subjects()
pytestmark = pytest.mark.looptime


@dataclass
class Kept:
    """A mark in memory."""

    mark: Mark | None = None
    where: str = "the memory of this test"

    async def read(self) -> Mark | None:
        return self.mark

    async def write(self, mark: Mark) -> None:
        self.mark = mark


async def leader(broker: FakeBroker) -> Engine:
    engine = Engine(broker, SUBJECTS, EventLog(broker, SUBJECTS), Snapshots(broker, SUBJECTS))
    await engine.take_over(CoordinatorElected(name="one"))
    return engine


async def settled(guard: LogGuard, engine: Engine) -> None:
    running = asyncio.create_task(engine.run())
    await guard.settle(engine)
    running.cancel()


async def test_a_log_is_put_back_once_also_by_who_stood_by_meanwhile(nats: FakeNats, broker: FakeBroker) -> None:
    kept = Kept()
    first = LogGuard(broker, kept)
    await first.check()
    engine = await leader(broker)
    await settled(first, engine)
    assert engine.world.epoch.id and engine.world.epoch.generation == 0

    kept.mark = Mark(epoch=engine.world.epoch.id, sequence=1, restored="a backup of last week")
    leads, stands_by = LogGuard(broker, kept), LogGuard(nats.connect(), kept)
    for guard in (leads, stands_by):
        await guard.check()
    engine = await leader(broker)
    await settled(leads, engine)
    assert engine.world.epoch.generation == 1
    kept.mark = Mark(epoch=engine.world.epoch.id, sequence=engine.last_sequence)

    successor = await leader(nats.connect())
    await settled(stands_by, successor)
    assert successor.world.epoch == engine.world.epoch


async def test_a_log_that_is_not_there_any_more_is_no_new_one(nats: FakeNats, broker: FakeBroker) -> None:
    kept = Kept(Mark(epoch="e", sequence=7))
    with pytest.raises(LogLost, match="7 events"):
        await LogGuard(broker, kept).check()
    del nats.streams["EVENTS"]
    with pytest.raises(LogLost, match="the memory of this test"):
        await LogGuard(broker, kept).check()


async def test_a_shorter_or_another_log_is_told(broker: FakeBroker) -> None:
    engine = await leader(broker)
    await settled(LogGuard(broker, Kept()), engine)
    for mark, generation in ((Mark(epoch=engine.world.epoch.id, sequence=99), 1), (Mark(epoch="another"), 2)):
        await settled(LogGuard(broker, Kept(mark)), engine)
        assert engine.world.epoch.generation == generation
