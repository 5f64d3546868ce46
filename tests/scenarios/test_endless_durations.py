"""A duration that no calendar holds means never, and breaks nothing, also when it is read from the log."""

from __future__ import annotations

from datetime import timedelta

import pytest

from fedtide.fabric.events.envelope import SignalReceived, TriggerApplied
from fedtide.fabric.plans.rollout_plan import Bake, Rate
from fedtide.fabric.plans.round_policy import RoundPolicy
from fedtide.fabric.plans.trigger_rule import Signal, TriggerRule
from fedtide.fabric.times import END_OF_TIME, later
from tests.scenarios.build import START, Story, cached, joined, opened, phase, received, requested, rollout, wave

LONG = 1e300


def test_later_ends_with_the_calendar() -> None:
    assert later(START, 1.0) == START + timedelta(seconds=1)
    assert later(START, LONG) == later(START, float("inf")) == END_OF_TIME


@pytest.mark.parametrize("seconds", [LONG, float("inf")])
def test_a_round_with_an_endless_deadline_goes_on(seconds: float) -> None:
    story = Story()
    policy = RoundPolicy(deadline_s=seconds, grace_s=seconds, quorum=1)
    story.tell(requested(policy=policy), opened(1, "a", "b", quorum=1), received(1, "a"), received(1, "b"))
    assert story.world.pending_commands()


def test_a_rollout_with_endless_times_goes_on() -> None:
    story = Story()
    times = {f"{what}_deadline_s": LONG for what in ("claim", "finish", "cache", "gate")}
    plan = {"bake": Bake(seconds=LONG), "rate": Rate(per_minute=1e-300, growth=LONG), **times}
    story.tell(joined("a"), joined("b"), rollout(wave("eu", "a", "b"), **plan), cached("eu"))
    story.tell(phase("a", "downloading"), phase("a", "confirmed"))
    assert story.world.pending_commands()


def test_a_rule_with_an_endless_cooldown_fires_once() -> None:
    story = Story()
    rule = {"name": "r", "on": "x", "cooldown_s": LONG, "do": {"kind": "round", "model": "m"}}
    story.tell(TriggerApplied(rule=TriggerRule.model_validate(rule)))
    for number in range(2):
        story.tell(SignalReceived(signal=Signal(id=str(number), type="x")))
    assert story.world.trigger("r").fired == 1
