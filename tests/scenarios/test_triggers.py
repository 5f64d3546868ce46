"""Trigger rules: once for one event, no more than the policy says, and why not, in one word."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest

from fedtide.coordinator.adapters import schedules
from fedtide.coordinator.commands import Fire, StopFired
from fedtide.coordinator.conditions import check, holds
from fedtide.coordinator.triggers import triggers
from fedtide.fabric.errors import ConfigError
from fedtide.fabric.events.envelope import FiringFailed, SignalReceived, TriggerApplied, TriggerRemoved
from fedtide.fabric.events.runs import RunCompleted
from fedtide.fabric.plans.trigger_rule import Schedule, Signal, StartRound, StartRun, TriggerRule
from tests.scenarios.build import APP, Story, apply, joined, phase, produced, published, requested, rollout, wave


def _rule(**changes: Any) -> TriggerApplied:
    rule = {"name": "r", "on": "drift", "do": StartRun(app=APP), **changes}
    return TriggerApplied(rule=TriggerRule.model_validate(rule))


def _signal(key: str = "1", type_: str = "drift", **fields: Any) -> SignalReceived:
    return SignalReceived(signal=Signal(id=key, type=type_, fields=fields))


def _fired(commands: tuple[Any, ...]) -> list[str]:
    return [c.id for c in commands if isinstance(c, Fire)]


def _outcomes(story: Story) -> list[str]:
    return [line.outcome for line in story.world.trigger("r").history]


def test_an_event_fires_its_rule_once_however_often_it_comes() -> None:
    story = Story()
    story.tell(_rule(policy="replace"))
    (first,) = _fired(story.tell(_signal("1")))
    assert first.startswith("run-")
    assert _fired(story.tell(_signal("1"))) == []
    assert _outcomes(story) == ["fired", "duplicate"]
    assert story.world.trigger("r").fired == 1


def test_a_restart_asks_again_for_what_was_fired_and_did_not_start_and_for_nothing_else() -> None:
    story = Story()
    story.tell(_rule())
    (key,) = _fired(story.tell(_signal()))
    assert [c.id for c in story.pending_commands() if isinstance(c, Fire)] == [key]
    assert [c.id for t in story.replayed().pending_commands() for c in t if isinstance(c, Fire)] == [key]
    story.tell(requested(key))
    assert [c for c in story.pending_commands() if isinstance(c, Fire)] == []


def test_a_storm_of_events_starts_one_run() -> None:
    story = Story()
    story.tell(_rule())
    fired = [k for n in range(10_000) for k in _fired(apply(story.world, story.event(_signal(str(n)))))]
    assert len(fired) == 1
    assert len(story.world.trigger("r").history) == triggers.HISTORY


def test_with_queue_the_next_goes_when_the_one_before_is_over_and_the_queue_is_bounded() -> None:
    story = Story()
    story.tell(_rule(policy="queue", max_queue=2))
    (first,) = _fired(story.tell(_signal("1")))
    story.tell(requested(first), _signal("2"), _signal("3"), _signal("4"))
    assert _outcomes(story) == ["fired", "queued", "queued", "queue full"]
    (second,) = _fired(story.tell(RunCompleted(run=first, attempt=1)))
    assert second == triggers.started_id(story.world.trigger("r").rule, Signal(id="2", type="drift"))


def test_with_replace_the_running_one_is_ended() -> None:
    story = Story()
    story.tell(_rule(policy="replace"))
    (first,) = _fired(story.tell(_signal("1")))
    story.tell(requested(first))
    commands = story.tell(_signal("2"))
    assert commands[0] == StopFired("r", first)
    assert len(_fired(commands)) == 1


def test_a_cooldown_and_a_budget_hold_firings_back() -> None:
    story = Story()
    story.tell(_rule(policy="replace", cooldown_s=10, budget=2))
    story.tell(_signal("1"), _signal("2"))
    story.tell(_signal("3"), after_s=30)
    story.tell(_signal("4"), after_s=30)
    assert _outcomes(story) == ["fired", "cooldown", "fired", "budget"]


def test_a_budget_of_rounds_is_spent_by_whole_runs_and_needs_their_number() -> None:
    story = Story()
    story.tell(_rule(policy="replace", budget_rounds=7, do=StartRun(app=APP, rounds=3)))
    story.tell(_signal("1"), _signal("2"), _signal("3"))
    assert _outcomes(story) == ["fired", "fired", "budget"]
    with pytest.raises(ValueError, match="budget_rounds"):
        _rule(budget_rounds=7)


def test_a_rule_may_ask_for_one_more_round_of_a_model() -> None:
    story = Story()
    story.tell(_rule(do=StartRound(model="m")))
    (key,) = _fired(story.tell(_signal()))
    assert key.startswith("run-")


def test_equal_dedupe_keys_fire_once_and_a_missing_key_is_an_error() -> None:
    story = Story()
    story.tell(_rule(policy="replace", dedupe="batch"))
    story.tell(_signal("1", batch="a"), _signal("2", batch="a"), _signal("3", batch="b"), _signal("4"))
    assert _outcomes(story) == ["fired", "duplicate", "fired", "error"]


def test_a_condition_that_is_false_or_cannot_be_evaluated_does_not_fire() -> None:
    story = Story()
    story.tell(_rule(where="psi > 0.2 and region == 'eu'"))
    story.tell(_signal("1", psi=0.1, region="eu"), _signal("2", psi=0.3), _signal("3", psi=0.3, region="eu"))
    assert _outcomes(story) == ["condition", "error", "fired"]
    assert "region" in story.world.trigger("r").history[1].reason


def test_a_firing_that_cannot_start_is_noted_and_frees_the_rule() -> None:
    story = Story()
    story.tell(_rule())
    (key,) = _fired(story.tell(_signal("1")))
    story.tell(FiringFailed(rule="r", id=key, reason="there is no model"))
    assert _outcomes(story) == ["fired", "failed"]
    assert story.world.trigger("r").active is None
    assert [c for c in story.pending_commands() if isinstance(c, Fire)] == []
    assert len(_fired(story.tell(_signal("2")))) == 1


def test_a_changed_rule_keeps_its_books_and_a_removed_one_is_gone() -> None:
    story = Story()
    story.tell(_rule(), _signal("1"), _rule(budget=1, policy="replace"), _signal("2"))
    assert _outcomes(story) == ["fired", "budget"]
    story.tell(TriggerRemoved(name="r"))
    assert story.tell(_signal("3")) == ()


def test_releases_roll_outs_fleet_and_data_are_signals_too() -> None:
    story = Story()
    story.tell(_rule(on="dev.fedtide.*", where="false"), joined("a", samples=7), requested(), produced(), published())
    story.tell(rollout(wave("eu", "", "a")), phase("a", "confirmed"), phase("a", "confirmed"))
    story.tell(RunCompleted(run="run-1", attempt=1))
    types = [line.type.removeprefix("dev.fedtide.") for line in story.world.trigger("r").history]
    assert types == ["fleet.changed", "data.reported", "release.published", "rollout.completed", "run.ended"]


def test_an_end_is_a_signal_whatever_brought_it_about() -> None:
    story = Story()
    story.tell(_rule(on="dev.fedtide.rollout.*", where="false"), rollout(wave("eu", "", "a b")))
    story.tell(phase("a", "confirmed"))
    story.ring()
    assert [line.type for line in story.world.trigger("r").history] == ["dev.fedtide.rollout.completed"]


def test_a_storm_under_replace_leaves_one_and_ends_every_other_also_after_a_restart() -> None:
    story = Story()
    story.tell(_rule(policy="replace"))
    keys = [_fired(story.tell(_signal(str(n))))[0] for n in range(3)]
    assert [c.id for c in story.pending_commands() if isinstance(c, Fire)] == keys[2:]
    assert [c.id for c in story.pending_commands() if isinstance(c, StopFired)] == keys[:2]
    assert not story.world.is_asked_for("r", keys[0])
    story.tell(requested(keys[0]), RunCompleted(run=keys[0], attempt=1))
    assert [c.id for c in story.pending_commands() if isinstance(c, StopFired)] == keys[1:2]


def test_a_roll_out_that_was_superseded_frees_its_rule() -> None:
    story = Story()
    story.tell(_rule(do={"kind": "rollout", "model": "m"}))
    (key,) = _fired(story.tell(_signal("1")))
    story.tell(rollout(wave("eu", "", "a"), key=key), rollout(wave("eu", "", "a"), key="other", counter=3))
    assert story.world.trigger("r").active is None


@pytest.mark.parametrize(
    ("expression", "fields", "expected"),
    [
        ("", {}, True),
        ("n > 2", {"n": 3}, True),
        ("n > 2 or name in ['a', 'b']", {"n": 1, "name": "b"}, True),
        ("not flag", {"flag": True}, False),
        ("abs(x) >= 0.5 and len(name) == 2", {"x": -0.5, "name": "ab"}, True),
    ],
)
def test_conditions_say_what_they_seem_to_say(expression: str, fields: dict[str, Any], expected: bool) -> None:
    check("where", expression) if expression else None
    assert holds(expression, fields) is expected


@pytest.mark.parametrize("expression", ["n >", "lambda: 1", "[x for x in y]", "f'{n}'"])
def test_what_is_no_condition_is_refused_with_its_position(expression: str) -> None:
    with pytest.raises(ConfigError, match="column"):
        check("where", expression)


@pytest.mark.parametrize("expression", ["n * 1.5 > 3", "10.0 ** n > 1"])
def test_numbers_beyond_all_bounds_are_an_error_not_a_crash(expression: str) -> None:
    with pytest.raises(ConfigError):
        holds(expression, {"n": 10**400})


@pytest.mark.parametrize("expression", ["__import__('os')", "n.__class__", "open('x')", "9 ** 9 ** 9", "'a' * 10 ** 9"])
def test_a_condition_reaches_nothing_but_its_fields(expression: str) -> None:
    with pytest.raises(ConfigError):
        holds(expression, {"n": 1})


def test_a_schedule_knows_its_time_zone_and_refuses_what_does_not_exist() -> None:
    moment = datetime(2026, 7, 1, 12, tzinfo=UTC)
    assert schedules.next_after(Schedule(cron="0 2 * * *", timezone="Europe/Berlin"), moment).hour == 0
    for wrong in (Schedule(cron="61 * * * *"), Schedule(cron="0 2 * * *", timezone="Mars/North")):
        with pytest.raises(ConfigError):
            schedules.next_after(wrong, moment)


def test_a_rule_needs_exactly_one_source() -> None:
    for sources in ({}, {"on": "x", "schedule": {"cron": "* * * * *"}}):
        with pytest.raises(ValueError, match="either"):
            TriggerRule.model_validate({"name": "r", "do": {"kind": "run"}, **sources})
