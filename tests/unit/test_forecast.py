"""When most nodes are likely to be free: what is learnt of a fleet, and what a schedule makes of it."""

from __future__ import annotations

import random
from datetime import UTC, datetime, timedelta
from statistics import mean

import pytest
from immutables import Map
from pydantic import ValidationError

from fedtide.coordinator.adapters.schedules import Chosen, best_for, due_until, next_after, which
from fedtide.coordinator.fleet import forecast
from fedtide.coordinator.fleet.forecast import Shares, after_sample, best_time, expected
from fedtide.fabric.events.costs import Availability, UsageReported
from fedtide.fabric.plans.trigger_rule import Schedule, StartRound, TriggerRule
from tests.scenarios.build import Story, joined

MONDAY = datetime(2026, 6, 1, tzinfo=UTC)
NIGHT = Schedule(when="most-available within 02:00-06:00")


def learnt(best: int, days: int = 7) -> Shares:
    """Of a fleet that is free at one hour of the night."""
    known: Shares = Map()
    for hour in range(24 * days):
        at = MONDAY + timedelta(hours=hour)
        known = after_sample(known, at, 0.9 if at.hour == best else 0.2)
    return known


def test_the_best_hour_of_a_window_is_taken_once_in_each() -> None:
    def pick(begin: datetime, end: datetime) -> datetime:
        return best_time(begin, end, {"eu": learnt(4)}, {"eu": 10})[0]

    at = next_after(NIGHT, MONDAY, pick)
    assert at == MONDAY + timedelta(hours=4)
    assert next_after(NIGHT, at, pick) == MONDAY + timedelta(days=1, hours=4)
    assert next_after(NIGHT, at - timedelta(minutes=5), pick) == at


def test_where_nothing_is_known_the_window_begins_with_it() -> None:
    assert best_time(MONDAY, MONDAY + timedelta(hours=4), {}, {"eu": 3}) == (MONDAY, None)
    assert next_after(NIGHT, MONDAY) == MONDAY + timedelta(hours=2)


def test_a_window_over_midnight_in_a_zone_whose_clocks_change_is_one_window() -> None:
    schedule = Schedule(when="most-available within 22:30-03:30", timezone="Europe/Berlin")
    moment, found = datetime(2026, 3, 27, 12, tzinfo=UTC), []
    for _ in range(3):
        moment = next_after(schedule, moment, lambda begin, end: end - timedelta(minutes=1))
        found.append(moment)
    assert [f"{at:%d %H:%M}" for at in found] == ["28 02:29", "29 01:29", "30 01:29"]


def test_an_hour_that_was_never_seen_is_like_that_of_other_days() -> None:
    known = learnt(4, days=2)
    assert expected(known, MONDAY + timedelta(days=5, hours=4)) == pytest.approx(0.9)
    assert expected(Map(), MONDAY) is None


def test_regions_count_by_their_nodes_that_would_be_asked() -> None:
    story = Story()
    story.tell(joined("e1"), joined("e2"), joined("u1", region="us"))
    for region, best in (("eu", 3), ("us", 5)):
        story.world.free[region] = learnt(best)
    everybody = TriggerRule(name="r", schedule=NIGHT, do=StartRound(model="m"))
    of_us = everybody.model_copy(update={"do": StartRound(model="m", selector={"region": "us"})})
    begin, end = MONDAY + timedelta(hours=2), MONDAY + timedelta(hours=6)
    assert [best_for(rule, story.world, {}, MONDAY)(begin, end).hour for rule in (everybody, of_us)] == [3, 5]


def test_a_time_that_was_chosen_stays_and_a_coordinator_that_comes_late_takes_the_best_of_the_rest() -> None:
    story, rule = Story(), TriggerRule(name="r", schedule=NIGHT, do=StartRound(model="m"))
    story.tell(joined("e1"))
    story.world.free["eu"] = learnt(4)
    chosen: Chosen = {}
    at = MONDAY + timedelta(hours=2, minutes=30)
    assert next_after(NIGHT, at, best_for(rule, story.world, chosen, at)) == MONDAY + timedelta(hours=4)
    story.world.free["eu"] = learnt(2)  # what is seen of the hour that passes
    later = at + timedelta(minutes=5)
    assert next_after(NIGHT, later, best_for(rule, story.world, chosen, later)) == MONDAY + timedelta(hours=4)
    story.world.free["eu"] = learnt(3)
    late = MONDAY + timedelta(hours=4, minutes=40)
    assert next_after(NIGHT, late - timedelta(minutes=10), best_for(rule, story.world, {}, late)) == late
    assert due_until(rule, MONDAY + timedelta(hours=3), late) == MONDAY + timedelta(hours=3)
    over = MONDAY + timedelta(hours=9)
    assert due_until(rule, MONDAY + timedelta(hours=3), over) is None


def test_two_windows_have_two_names_also_where_the_clock_leaves_one_out() -> None:
    gap = Schedule(when="most-available within 02:00-03:00", timezone="Europe/Berlin")
    rule = TriggerRule(name="r", schedule=gap, do=StartRound(model="m"))
    moment, names = datetime(2026, 3, 27, 12, tzinfo=UTC), []
    for _ in range(4):
        moment = next_after(gap, moment)
        names.append(which(rule, moment))
    assert len(set(names)) == 4 and moment.day == 31


def test_what_reports_say_is_in_the_world_and_the_same_after_a_restart() -> None:
    story = Story()
    told = {"eu": Availability(nodes=4, free=1), "us": Availability(nodes=0, free=0)}
    story.tell(UsageReported(source="coordinator", items=[], available=told))
    assert list(story.world.free) == ["eu"] and next(iter(story.world.free["eu"].values())) == 0.25


def test_on_a_simulated_fleet_more_nodes_are_free_than_at_any_fixed_hour() -> None:
    """Shops of two kinds whose free hours differ by weekday, over twelve weeks; the first two only teach."""
    chance = random.Random(7)

    def free(at: datetime) -> float:
        best = 3 if at.weekday() < 5 else 5
        return min(1.0, max(0.0, 0.85 - 0.15 * abs(at.hour - best) + chance.gauss(0, 0.05)))

    known: Shares = Map()
    gained: dict[str, list[float]] = {name: [] for name in ("forecast", "2", "3", "4", "5")}
    for day in range(84):
        night = MONDAY + timedelta(days=day)
        truth = {hour: free(night + timedelta(hours=hour)) for hour in range(24)}
        if day >= 14:
            chosen, _ = best_time(night + timedelta(hours=2), night + timedelta(hours=6), {"eu": known}, {"eu": 1})
            gained["forecast"].append(truth[chosen.hour])
            for hour in (2, 3, 4, 5):
                gained[str(hour)].append(truth[hour])
        for hour, share in truth.items():
            for _ in range(4):
                known = after_sample(known, night + timedelta(hours=hour), share)
    means = {name: mean(shares) for name, shares in gained.items()}
    assert means["forecast"] > max(share for name, share in means.items() if name != "forecast") + 0.02, means
    assert len(known) <= forecast.HOURS


@pytest.mark.parametrize(
    "wrong", [{}, {"cron": "0 2 * * *", "when": NIGHT.when}, {"when": "most-available within 25:00-26:00"}]
)
def test_a_schedule_is_one_of_both(wrong: dict[str, str]) -> None:
    with pytest.raises(ValidationError):
        Schedule.model_validate(wrong)
