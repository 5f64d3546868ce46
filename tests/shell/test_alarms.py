"""Alarms and schedules: what rang into a pause rings again, and what passed unnoticed is made up for once."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta

import pytest

from fedtide.coordinator.adapters import schedules
from fedtide.coordinator.adapters.schedules import MAKE_UP_S, due_until
from fedtide.coordinator.commands import Commands, SetAlarm
from fedtide.coordinator.log.engine import Engine
from fedtide.coordinator.log.event_log import EventLog
from fedtide.coordinator.log.snapshots import Snapshots
from fedtide.coordinator.log.timers import Alarms
from fedtide.coordinator.rollouts import rollouts
from fedtide.fabric.events.envelope import (
    AlarmRang,
    CoordinatorElected,
    Event,
    SignalReceived,
    TriggerApplied,
    TriggerRemoved,
)
from fedtide.fabric.events.rollouts import RolloutPauseRequested, RolloutResumeRequested
from fedtide.fabric.nats.subjects import Subjects
from fedtide.fabric.plans.trigger_rule import TriggerRule
from tests.scenarios.build import joined, rollout, wave
from tests.shell.fake_broker import FakeBroker

SUBJECTS = Subjects()
NOON = datetime(2026, 3, 1, 12, 0, tzinfo=UTC)


def rule(cron: str, timezone: str = "UTC") -> TriggerRule:
    schedule = {"cron": cron, "timezone": timezone}
    action = {"kind": "run", "model": "m"}
    return TriggerRule.model_validate({"name": "r", "on": "", "schedule": schedule, "do": action})


@pytest.mark.looptime
async def test_an_alarm_that_rang_into_a_pause_rings_again_afterwards(broker: FakeBroker) -> None:
    engine = Engine(broker, SUBJECTS, EventLog(broker, SUBJECTS), Snapshots(broker, SUBJECTS))
    await engine.take_over(CoordinatorElected(name="one"))
    running = asyncio.create_task(engine.run())
    async with asyncio.TaskGroup() as group:
        alarms = Alarms(engine, group)

        def execute(_: str, commands: Commands) -> None:
            for command in commands:
                if isinstance(command, SetAlarm):
                    alarms.set(command)

        engine.lead(execute)
        await engine.submit(rollout(wave("eu", "n1"), cache_deadline_s=0.2))
        (alarm,) = [c for c in rollouts.pending_commands(engine.world.rollouts["ro-1"]) if isinstance(c, SetAlarm)]
        await engine.submit(RolloutPauseRequested(rollout="ro-1", reason="test"))
        await engine.submit(AlarmRang(owner="rollout", id="ro-1", key=alarm.key))
        await engine.submit(RolloutResumeRequested(rollout="ro-1"))
        assert rollouts.state_name(engine.world.rollouts["ro-1"]) == "rolling"
        await asyncio.sleep(60)
        state = engine.world.rollouts["ro-1"]
        assert isinstance(state, rollouts.Paused) and "has not got the release within" in state.reason
    running.cancel()


@pytest.mark.parametrize(
    ("cron", "first", "expected"),
    [
        ("* * * * *", NOON - timedelta(seconds=200), NOON),
        ("0 12 * * *", NOON, NOON),
        ("30 11 * * *", NOON - timedelta(minutes=30), None),
        ("55 11 * * *", NOON - timedelta(minutes=5), NOON - timedelta(minutes=5)),
    ],
)
def test_of_the_times_that_passed_only_the_last_counts_and_only_if_it_is_not_long_ago(
    cron: str, first: datetime, expected: datetime | None
) -> None:
    assert timedelta(minutes=5).total_seconds() < MAKE_UP_S < timedelta(minutes=30).total_seconds()
    assert due_until(rule(cron), first, NOON) == expected


async def test_a_schedule_fires_at_its_times_and_a_rule_that_is_removed_no_more(
    broker: FakeBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(schedules, "next_after", lambda _, moment, __: moment + timedelta(seconds=0.02))
    engine = Engine(broker, SUBJECTS, EventLog(broker, SUBJECTS), Snapshots(broker, SUBJECTS))
    await engine.take_over(CoordinatorElected(name="one"))
    tasks = [asyncio.create_task(engine.run()), asyncio.create_task(schedules.keep(engine))]
    events: asyncio.Queue[Event] = asyncio.Queue()
    with engine.listening(events):
        await engine.submit(TriggerApplied(rule=rule("* * * * *")))
        for _ in range(3):
            while not isinstance((await events.get()).data, SignalReceived):
                pass
        assert not any(task.done() for task in tasks)
        assert engine.world.triggers["r"].history[0].type == "dev.fedtide.schedule.r"
        await engine.submit(TriggerRemoved(name="r"))
        while not isinstance((await events.get()).data, TriggerRemoved):
            pass
        await engine.submit(joined("n1"))
        assert (await events.get()).data.kind == "node.joined"
    for task in tasks:
        task.cancel()


async def test_a_time_that_fell_into_a_fail_over_is_made_up_for(
    broker: FakeBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = Engine(broker, SUBJECTS, EventLog(broker, SUBJECTS), Snapshots(broker, SUBJECTS))
    await first.take_over(CoordinatorElected(name="one"))
    running = asyncio.create_task(first.run())
    await first.submit(TriggerApplied(rule=rule("* * * * *")))
    running.cancel()
    missed = datetime.now(UTC)
    far = missed + timedelta(days=1)
    monkeypatch.setattr(schedules, "next_after", lambda _, moment, __: missed if moment < missed else far)
    second = Engine(broker, SUBJECTS, EventLog(broker, SUBJECTS), Snapshots(broker, SUBJECTS))
    await second.take_over(CoordinatorElected(name="two"))
    tasks = [asyncio.create_task(second.run()), asyncio.create_task(schedules.keep(second))]
    events: asyncio.Queue[Event] = asyncio.Queue()
    with second.listening(events):
        async with asyncio.timeout(10):
            assert isinstance((await events.get()).data, SignalReceived)
    for task in tasks:
        task.cancel()
