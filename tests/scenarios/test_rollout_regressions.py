"""Roll-outs that once got stuck, forgot a node, or judged too early: one sentence each."""

from __future__ import annotations

from fedtide.coordinator.commands import SetAlarm, SetDesired, SettleNodes
from fedtide.coordinator.rollouts import rollouts
from fedtide.fabric.events.envelope import NodeOffline, NodeOnline
from fedtide.fabric.events.rollouts import (
    RolloutAbortRequested,
    RolloutNextRequested,
    RolloutPauseRequested,
    RolloutPromoteRequested,
    RolloutRetryRequested,
)
from fedtide.fabric.plans.rollout_plan import Bake, InferenceErrorGate, MetricGate, PairedGate, Rate, Terms
from fedtide.fabric.plans.windows import Window
from tests.scenarios.build import (
    Story,
    joined,
    measured,
    phase,
    rollout,
    wave,
)
from tests.scenarios.rollout_story import TWO_WAVES, confirm, nodes_of, offers, started, state_of, view_of


def test_a_metric_gate_waits_for_its_data_and_is_judged_after_the_bake() -> None:
    gate = MetricGate(pass_if="error_rate < 0.1", fail_if="error_rate > 0.5")
    story = started(gates=[gate], bake=Bake(seconds=60, inferences=10))
    confirm(story, "e1")
    assert isinstance(state_of(story), rollouts.Rolling)
    assert "no node has reported error_rate yet" in view_of(story).reason
    story.tell(measured("e1", inferences=20))
    assert offers(story.ring()) == ["e2", "e3"]


def test_a_node_that_waited_for_its_window_has_its_time_from_when_it_opens() -> None:
    window = Window(start="00:00", end="00:30", timezone="UTC")
    story = started(wave("eu", "", "a"), terms=Terms(window=window), finish_deadline_s=600, claim_deadline_s=600)
    story.tell(phase("a", "smoke_tested"))
    for _ in range(3):
        story.tell(phase("a", "smoke_tested"), after_s=9 * 3600)  # it waits until tomorrow
    assert nodes_of(story)["a"].phase == "smoke_tested"
    assert isinstance(state_of(story), rollouts.Rolling)
    story.ring()
    assert isinstance(state_of(story), rollouts.RolledBack), "what does not go on in its window is stuck"


def test_no_alarm_is_set_for_what_only_a_person_can_decide() -> None:
    story = started(approve_after_canary=True, gate_deadline_s=5)
    confirm(story, "e1")
    story.ring()
    assert not [c for c in story.pending_commands() if isinstance(c, SetAlarm)]
    assert offers(story.tell(RolloutPromoteRequested(rollout="ro-1"))) == ["e2", "e3"]


def test_a_person_can_go_on_past_a_failed_gate() -> None:
    story = started(gates=[PairedGate()], on_failure="pause")
    confirm(story, "e1")
    story.tell(measured("e1", ties=400, losses=40))
    assert isinstance(state_of(story), rollouts.Paused)
    assert offers(story.tell(RolloutPromoteRequested(rollout="ro-1"))) == ["e2", "e3"]
    confirm(story, "e2", "e3")
    assert "u1" in nodes_of(story)


def test_a_promotion_of_one_region_does_not_let_another_expire() -> None:
    us = wave("us", "u0", "u1")
    story = started(wave("eu", "e1", "e2"), us.model_copy(update={"group": 0}), bake=Bake(seconds=10))
    story.tell(RolloutNextRequested(rollout="ro-1"))
    confirm(story, "e1")
    story.tell(phase("u0", "downloading"), RolloutPauseRequested(rollout="ro-1"))
    story.tell(RolloutPromoteRequested(rollout="ro-1", region="eu"), after_s=3600)
    assert isinstance(state_of(story), rollouts.Rolling)
    assert nodes_of(story)["u0"].phase == "downloading"


def test_canaries_that_are_away_do_not_end_their_bake() -> None:
    story = Story()
    story.tell(joined("e1"), rollout(*TWO_WAVES, bake=Bake(seconds=10)))
    confirm(story, "e1")
    story.tell(NodeOffline(node="e1", reason="no heartbeat"))
    story.ring()
    assert "e2" not in nodes_of(story)
    assert offers(story.tell(NodeOnline(node="e1"))) == ["e2", "e3"]


def test_a_node_that_comes_back_to_an_old_offer_during_the_bake_is_watched_as_a_late_one() -> None:
    story = started(wave("eu", "", "a b"), bake=Bake(seconds=600), finish_deadline_s=9000)
    confirm(story, "a")
    story.ring()
    story.tell(phase("b", "downloading"))
    story.ring()
    assert isinstance(state_of(story), rollouts.Completed)
    assert nodes_of(story)["b"].stage == "catch_up"
    assert [c for c in story.pending_commands() if isinstance(c, SetAlarm)]


def test_late_nodes_are_counted_with_everybody_and_pass_the_same_gates() -> None:
    story = started(wave("eu", "", "a b c d"), max_error=0.4, gates=[InferenceErrorGate()], bake=Bake(seconds=5))
    story.tell(*(joined(n) for n in "abcd"), NodeOffline(node="c", reason="gone"), NodeOffline(node="d", reason="gone"))
    confirm(story, "a", "b")
    story.tell(measured("a", inferences=5000), measured("b", inferences=5000))
    while isinstance(state_of(story), rollouts.Rolling):
        story.ring()
    story.tell(NodeOnline(node="c"), phase("c", "failed", "disk full"))
    assert isinstance(state_of(story), rollouts.Completed), "one of three attempted"
    story.tell(NodeOnline(node="d"))
    commands = confirm(story, "d")
    assert not [c for c in commands if isinstance(c, SetDesired)], "it is watched first"
    story.tell(measured("d", errors=500))
    assert isinstance(state_of(story), rollouts.RolledBack)
    assert "catch-up: errors" in state_of(story).reason


def test_what_was_taken_back_with_its_wave_is_not_waited_for_again() -> None:
    story = started(wave("eu", "", "a"), on_failure="rollback_wave")
    story.tell(phase("a", "failed"), phase("a", "confirmed", counter=2))
    story.tell(joined("later"))
    story.tell(RolloutAbortRequested(rollout="ro-1"))
    assert not [c for c in story.pending_commands() if isinstance(c, SetDesired)]


def test_a_node_that_cannot_go_back_is_named() -> None:
    story = started(wave("eu", "", "a b"))
    story.tell(RolloutAbortRequested(rollout="ro-1"), phase("a", "failed", "no room", counter=2))
    assert "2 nodes are not back yet; a cannot go back: no room" in view_of(story).reason


def test_canaries_of_a_superseded_roll_out_are_watched_no_more() -> None:
    story = started(wave("eu", "a", "b"), terms=Terms(measure=True), bake=Bake(seconds=60))
    confirm(story, "a")
    commands = story.tell(rollout(wave("us", "", "u"), key="ro-2", counter=3))
    assert SettleNodes("ro-1", ("a",)) in commands
    kept = rollouts.kept_states(story.world.rollouts["ro-1"])
    assert [(c.node, c.terms.measure) for c in kept] == [("a", False)]


def test_a_retry_keeps_to_the_rate() -> None:
    story = started(wave("eu", "", "a b c d"), rate=Rate(in_flight=2), max_error=1.0, min_success=0.0)
    story.tell(*(phase(n, "failed") for n in "abcd"))
    assert isinstance(state_of(story), rollouts.Completed)
    commands = story.tell(RolloutRetryRequested(rollout="ro-1", counter=3))
    assert len(offers(commands)) == 4, "catch-up: ten at a time"
    story = started(wave("eu", "", "a b c d"), rate=Rate(in_flight=2), max_error=1.0, min_success=0.9)
    story.tell(*(phase(n, "failed") for n in "abcd"))
    assert isinstance(state_of(story), rollouts.Paused)
    assert len(offers(story.tell(RolloutRetryRequested(rollout="ro-1", counter=3)))) == 2


def test_a_node_whose_offer_had_expired_gets_one_more_and_not_for_ever() -> None:
    story = started(wave("eu", "", "a b"))
    confirm(story, "a")
    story.ring()
    assert offers(story.tell(phase("b", "timed_out", "expired"))) == ["b"]
    story.ring()
    assert offers(story.tell(phase("b", "timed_out", "expired"))) == []


def test_what_was_stopped_by_errors_of_late_nodes_can_be_resumed() -> None:
    story = started(wave("eu", "", "a b"), on_failure="pause")
    story.tell(joined("a"), joined("b"), NodeOffline(node="b", reason="gone"))
    confirm(story, "a")
    story.ring()
    story.tell(NodeOnline(node="b"), phase("b", "failed", "no room"))
    assert "no room" in view_of(story).reason
    assert offers(story.tell(RolloutRetryRequested(rollout="ro-1", counter=3))) == ["b"]
