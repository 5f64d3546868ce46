"""Rates, windows, gates, and what people ask of a roll-out: one sentence a rule."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest

from fedtide.coordinator.commands import SetDesired
from fedtide.coordinator.rollouts import rollouts
from fedtide.fabric.errors import InvalidTransition
from fedtide.fabric.events.envelope import NodeOffline, NodeOnline
from fedtide.fabric.events.rollouts import (
    RolloutAbortRequested,
    RolloutNextRequested,
    RolloutPauseRequested,
    RolloutPromoteRequested,
    RolloutResumeRequested,
    RolloutRollbackRequested,
)
from fedtide.fabric.plans.rollout_plan import Bake, MetricGate, PairedGate, Rate, Terms
from fedtide.fabric.plans.windows import Window
from tests.scenarios.build import (
    START,
    Story,
    joined,
    measured,
    phase,
    rollout,
    wave,
)
from tests.scenarios.rollout_story import confirm, nodes_of, offers, started, state_of, view_of

# Rate and windows


def test_the_rate_bounds_offers_and_grows_with_success() -> None:
    names = " ".join(f"n{i}" for i in range(10))
    story = Story()
    first = story.tell(rollout(wave("eu", "", names), rate=Rate(per_minute=1, growth=2)))
    assert offers(first) == ["n0"]
    assert offers(story.ring()) == ["n1"]
    confirm(story, "n0", "n1")
    at = story.events[-1].time
    offered = [name for _ in range(4) for name in offers(story.ring())]
    assert offered == ["n2", "n3", "n4", "n5"]
    assert (story.events[-1].time - at).total_seconds() == pytest.approx(60, abs=2)


def test_no_more_nodes_than_allowed_are_in_flight() -> None:
    story = Story()
    assert len(offers(story.tell(rollout(wave("eu", "", "a b c d"), rate=Rate(in_flight=2))))) == 2
    assert offers(confirm(story, "a")) == ["c"]


def test_nodes_are_offered_the_release_inside_their_own_maintenance_window() -> None:
    assert START.hour == 0
    window = Window(start="02:00", end="04:00")
    story = Story()
    commands = story.tell(
        rollout(
            wave("eu", "", "berlin tokyo"),
            terms=Terms(window=window),
            timezones={"berlin": "Europe/Berlin", "tokyo": "Asia/Tokyo"},
        )
    )
    assert offers(commands) == []
    assert offers(story.ring()) == ["berlin"]
    assert story.events[-1].time == datetime(2026, 1, 1, 1, 0, tzinfo=UTC)
    confirm(story, "berlin")
    while not (offered := offers(story.ring())):
        pass
    assert offered == ["tokyo"]
    assert story.events[-1].time == datetime(2026, 1, 1, 17, 0, tzinfo=UTC)


# Bake and gates


def test_a_bake_needs_its_time_and_its_inferences() -> None:
    story = started(bake=Bake(seconds=60, inferences=100))
    confirm(story, "e1")
    story.tell(measured("e1", inferences=100))
    assert "e2" not in nodes_of(story)
    assert offers(story.ring()) == ["e2", "e3"]
    story = started(bake=Bake(seconds=60, inferences=100))
    confirm(story, "e1")
    story.ring()
    assert "e2" not in nodes_of(story)
    assert offers(story.tell(measured("e1", inferences=100))) == ["e2", "e3"]


def test_an_inconclusive_gate_does_not_promote_however_long_it_takes() -> None:
    story = started(gates=[PairedGate()], gate_deadline_s=100)
    confirm(story, "e1")
    story.tell(measured("e1", ties=5))
    assert "e2" not in nodes_of(story)
    assert "needs about" in view_of(story).reason
    story.ring()
    assert isinstance(state_of(story), rollouts.Paused)
    assert "still undecided" in state_of(story).reason
    assert "e2" not in nodes_of(story)


def test_an_inconclusive_gate_pauses_at_once_if_the_plan_says_so() -> None:
    story = started(gates=[PairedGate()], on_inconclusive="pause")
    confirm(story, "e1")
    assert isinstance(state_of(story), rollouts.Paused)


def test_a_passing_gate_promotes_and_a_failing_one_takes_the_release_back() -> None:
    story = started(gates=[PairedGate()])
    confirm(story, "e1")
    assert offers(story.tell(measured("e1", ties=600, wins=3, losses=2))) == ["e2", "e3"]
    story = started(gates=[PairedGate()])
    confirm(story, "e1")
    story.tell(measured("e1", ties=400, losses=40))
    assert isinstance(state_of(story), rollouts.RolledBack)
    assert all(word in state_of(story).reason for word in ("eu, canary", "paired", "-0.09", "allowed -0.02", "n 440"))


def test_a_gate_that_cannot_be_evaluated_is_an_error_and_never_a_pass() -> None:
    story = started(gates=[MetricGate(pass_if="no_such_field < 1")])
    confirm(story, "e1")
    assert isinstance(state_of(story), rollouts.Paused)
    assert "cannot be judged" in state_of(story).reason
    assert "e2" not in nodes_of(story)


def test_a_gate_that_is_not_enforced_is_shown_and_has_no_effect() -> None:
    story = started(gates=[PairedGate(enforce=False), MetricGate(pass_if="nonsense > 0", enforce=False)])
    assert offers(confirm(story, "e1")) == ["e2", "e3"]
    assert [g.outcome for g in view_of(story).regions[0].gates] == ["inconclusive", "error"]


def test_the_worst_slice_decides() -> None:
    story = started(
        wave("eu", "x86 arm", "e2"),
        gates=[PairedGate(slices=["hardware"])],
        slices={"hardware=x86": ["x86", "e2"], "hardware=arm": ["arm"]},
    )
    confirm(story, "x86", "arm")
    story.tell(measured("x86", ties=100_000, wins=900))
    assert "hardware=arm" in view_of(story).reason
    story.tell(measured("arm", ties=300, losses=60))
    assert isinstance(state_of(story), rollouts.RolledBack)
    assert "hardware=arm" in state_of(story).reason


def test_errors_are_judged_before_gates_that_pass() -> None:
    story = started(wave("eu", "a b", "c"), gates=[PairedGate()])
    story.tell(phase("a", "confirmed"), measured("a", ties=10_000), phase("b", "failed"))
    assert isinstance(state_of(story), rollouts.RolledBack)


# What people ask for


def test_an_abort_is_honoured_in_every_stage_and_takes_everything_back() -> None:
    for before in ([], [phase("e1", "downloading")], [phase("e1", "active")], [phase("e1", "confirmed")]):
        story = started()
        story.tell(*before)
        offered = set(nodes_of(story))
        commands = story.tell(RolloutAbortRequested(rollout="ro-1"))
        assert {c.node for c in commands} == offered
        assert state_of(story).reason.startswith("aborted")


def test_a_pause_offers_nothing_loses_no_report_and_goes_on_where_it_was() -> None:
    story = started()
    story.tell(RolloutPauseRequested(rollout="ro-1", reason="lunch"))
    assert confirm(story, "e1") == ()
    assert "lunch" in state_of(story).reason
    assert offers(story.tell(RolloutResumeRequested(rollout="ro-1"))) == ["e2", "e3"]


def test_a_paused_roll_out_is_still_taken_back_when_nodes_fail() -> None:
    story = started()
    story.tell(RolloutPauseRequested(rollout="ro-1"), phase("e1", "failed"))
    assert isinstance(state_of(story), rollouts.RolledBack)


def test_a_deadline_does_not_run_out_during_a_pause() -> None:
    story = started(wave("eu", "", "a b"))
    story.tell(phase("b", "downloading"), RolloutPauseRequested(rollout="ro-1"))
    story.tell(phase("a", "confirmed"), after_s=5000)
    story.tell(RolloutResumeRequested(rollout="ro-1"))
    assert nodes_of(story)["b"].phase == "downloading"


def test_an_approval_is_waited_for_and_given_region_by_region() -> None:
    guarded = wave("us", "", "u1").model_copy(update={"approval": True, "group": 1})
    story = started(wave("eu", "", "e1"), guarded)
    assert offers(confirm(story, "e1")) == []
    assert "approval" in view_of(story).reason
    with pytest.raises(InvalidTransition):
        story.tell(RolloutPromoteRequested(rollout="ro-1", region="eu"))
    assert offers(story.tell(RolloutPromoteRequested(rollout="ro-1", region="us"))) == ["u1"]


def test_canaries_wait_for_an_approval_that_a_plan_wants() -> None:
    story = started(approve_after_canary=True)
    assert offers(confirm(story, "e1")) == []
    assert offers(story.tell(RolloutPromoteRequested(rollout="ro-1"))) == ["e2", "e3"]


def test_the_next_wave_can_be_started_by_hand() -> None:
    story = started(wave("eu", "", "e1"), wave("us", "", "u1").model_copy(update={"group": 1}))
    assert offers(story.tell(RolloutNextRequested(rollout="ro-1"))) == ["u1"]
    with pytest.raises(InvalidTransition):
        story.tell(RolloutNextRequested(rollout="ro-1"))


@pytest.mark.parametrize("wish", [RolloutPauseRequested, RolloutResumeRequested, RolloutAbortRequested])
def test_a_wish_that_makes_no_sense_any_more_is_refused(wish: Any) -> None:
    story = started(wave("eu", "", "a"))
    confirm(story, "a")
    with pytest.raises(InvalidTransition, match="completed"):
        story.tell(wish(rollout="ro-1"))


def test_a_newer_roll_out_of_the_model_supersedes_the_older_one() -> None:
    story = started()
    story.tell(rollout(wave("eu", "", "e1"), key="ro-2", counter=3))
    assert isinstance(state_of(story), rollouts.Superseded)
    assert story.world.model("m").counter == 4
    assert all(c.rollout == "ro-2" for c in story.pending_commands() if isinstance(c, SetDesired))


def test_a_superseded_roll_out_serves_no_catch_up_cohort_and_is_not_rolled_back() -> None:
    story = started(wave("eu", "", "a b"))
    confirm(story, "a")
    story.ring()
    story.tell(joined("b"), NodeOffline(node="b", reason="gone"))
    story.tell(rollout(wave("eu", "", "a"), key="ro-2", counter=3))
    assert offers(story.tell(NodeOnline(node="b"))) == []
    with pytest.raises(InvalidTransition):
        story.tell(RolloutRollbackRequested(rollout="ro-1"))
