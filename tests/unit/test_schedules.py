"""Schedules where clocks change: which times come, and that the answer does not depend on when it is asked for."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from itertools import pairwise
from zoneinfo import ZoneInfo

import pytest

from fedtide.coordinator.adapters.schedules import MAKE_UP_S, due_until, next_after
from fedtide.fabric.errors import ConfigError
from fedtide.fabric.plans.trigger_rule import Schedule, StartRound, TriggerRule


def _times(cron: str, zone: str, first: datetime, hours: float) -> list[datetime]:
    schedule, found, at = Schedule(cron=cron, timezone=zone), [], first
    while (at := next_after(schedule, at)) <= first + timedelta(hours=hours):
        found.append(at)
    return found


@pytest.mark.parametrize(
    ("cron", "zone", "first", "hours", "expected"),
    [
        ("30 2 * * *", "Europe/Berlin", "2026-03-28T12:00", 48, ["29 03:00", "30 02:30"]),  # 02:30 does not exist
        ("30 2 * * *", "Europe/Berlin", "2026-10-24T12:00", 48, ["25 02:30", "26 02:30"]),  # 02:30 happens twice
        ("0 */2 * * *", "Europe/Berlin", "2026-03-28T22:30", 5, ["29 00:00", "29 04:00"]),  # it has a wildcard
        ("0 0 * * *", "America/Sao_Paulo", "2018-11-03T12:00", 40, ["04 01:00", "05 00:00"]),  # midnight is skipped
        ("15 1 * * *", "America/New_York", "2026-10-31T12:00", 48, ["01 01:15", "02 01:15"]),
        ("45 1 * * *", "Australia/Lord_Howe", "2026-04-04T00:00", 40, ["05 01:45", "06 01:45"]),  # half an hour
    ],
)
def test_a_daily_time_comes_once_a_day_when_clocks_change(
    cron: str, zone: str, first: str, hours: float, expected: list[str]
) -> None:
    found = _times(cron, zone, datetime.fromisoformat(first).replace(tzinfo=UTC), hours)
    assert [f"{at.astimezone(ZoneInfo(zone)):%d %H:%M}" for at in found] == expected


def test_what_comes_every_half_hour_goes_on_through_the_hour_that_happens_twice() -> None:
    found = _times("*/30 * * * *", "Europe/Berlin", datetime(2026, 10, 24, 22, 45, tzinfo=UTC), 5)
    assert len(found) == 10 and {b - a for a, b in pairwise(found)} == {timedelta(minutes=30)}


@pytest.mark.parametrize("cron", ["30 2 * * *", "15 * * * *", "*/20 1-3 * * *", "59 2 * * 0"])
@pytest.mark.parametrize("first", ["2026-03-28T20:00", "2026-10-24T20:00"])
def test_whenever_it_is_asked_the_next_time_is_the_same_and_to_come(cron: str, first: str) -> None:
    began = datetime.fromisoformat(first).replace(tzinfo=UTC)
    times, schedule = _times(cron, "Europe/Berlin", began, 24 * 8), Schedule(cron=cron, timezone="Europe/Berlin")
    for minutes in range(0, 12 * 60, 7):
        moment = began + timedelta(minutes=minutes, seconds=11)
        assert next_after(schedule, moment) == next(at for at in times if at > moment)


def test_of_the_times_that_passed_unnoticed_the_last_one_is_made_up_for() -> None:
    rule = TriggerRule(name="nightly", schedule=Schedule(cron="*/5 * * * *"), do=StartRound(model="m"))
    now = datetime(2026, 5, 1, 12, 2, tzinfo=UTC)
    first = datetime(2026, 5, 1, 11, 30, tzinfo=UTC)
    assert due_until(rule, first, now) == datetime(2026, 5, 1, 12, 0, tzinfo=UTC)
    daily = rule.model_copy(update={"schedule": Schedule(cron="0 11 * * *")})
    passed = datetime(2026, 5, 1, 11, 0, tzinfo=UTC)
    assert due_until(daily, passed, passed + timedelta(seconds=MAKE_UP_S)) == passed
    assert due_until(daily, passed, passed + timedelta(seconds=MAKE_UP_S + 1)) is None


@pytest.mark.parametrize(("cron", "zone"), [("61 * * * *", "UTC"), ("* * *", "UTC"), ("* * * * *", "Mars/Base")])
def test_what_is_no_schedule_is_named(cron: str, zone: str) -> None:
    with pytest.raises(ConfigError, match="schedule"):
        next_after(Schedule(cron=cron, timezone=zone), datetime.now(UTC))
