"""Roll-outs: one sentence a rule, and the traps that real systems fell into."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedtide.coordinator.commands import CacheRelease, CancelRun, SetAlarm, SetDesired, SettleNodes
from fedtide.coordinator.log import snapshot_codec as world_codec
from fedtide.coordinator.rollouts import rollouts, waves
from fedtide.fabric.errors import InvalidTransition
from fedtide.fabric.events.envelope import NodeOffline, NodeOnline
from fedtide.fabric.events.rollouts import (
    RolloutAbortRequested,
    RolloutPauseRequested,
    RolloutPromoteRequested,
    RolloutResumeRequested,
    RolloutRetryRequested,
    RolloutRollbackRequested,
    RolloutSettled,
)
from fedtide.fabric.plans.rollout_plan import Bake, NodePhase, PairedGate, Terms
from tests.scenarios.build import (
    Story,
    apply,
    cached,
    joined,
    phase,
    ref,
    requested,
    rollout,
    wave,
)
from tests.scenarios.rollout_story import TWO_WAVES, confirm, nodes_of, offers, started, state_of, view_of

# Waves and their order


def test_only_the_canaries_of_the_first_wave_are_offered_first() -> None:
    commands = started().tell(cached("us"))
    assert commands == ()
    story = Story()
    commands = story.tell(rollout(*TWO_WAVES))
    assert offers(commands) == ["e1"]
    (clock,) = [c for c in commands if isinstance(c, SetAlarm) and c.key == "rolling-0"][-1:]
    assert clock.due == story.events[-1].time + timedelta(seconds=300)


def test_no_node_is_offered_the_release_before_its_region_has_every_chunk() -> None:
    story = Story()
    commands = story.tell(rollout(*TWO_WAVES), caches=False)
    assert [type(c) for c in commands] == [CacheRelease, SetAlarm]
    assert [type(c) for c in story.pending_commands()] == [CacheRelease, SetAlarm]
    assert offers(story.tell(cached("eu", wan_bytes=77))) == ["e1"]
    assert view_of(story).regions[0].wan_bytes == 77


def test_a_region_whose_leaf_gets_nothing_pauses_the_roll_out() -> None:
    story = Story()
    story.tell(rollout(*TWO_WAVES, cache_deadline_s=60), caches=False)
    story.ring()
    assert "leaf has not got the release" in state_of(story).reason


def test_waves_go_in_region_order_and_each_waits_for_the_one_before() -> None:
    story = started()
    assert offers(confirm(story, "e1")) == ["e2", "e3"]
    assert offers(confirm(story, "e2")) == []
    assert offers(confirm(story, "e3")) == ["u1", "u2"]
    confirm(story, "u1", "u2")
    assert isinstance(state_of(story), rollouts.Completed)
    assert [w.seconds > 0 for w in state_of(story).waves] == [True, True]


def test_waves_of_one_group_go_side_by_side() -> None:
    us, ap = (wave(r, "", n).model_copy(update={"group": 1}) for r, n in (("us", "u1"), ("ap", "a1")))
    story = started(wave("eu", "", "e1"), us, ap)
    assert sorted(offers(confirm(story, "e1"))) == ["a1", "u1"]
    confirm(story, "u1")
    assert isinstance(state_of(story), rollouts.Rolling)
    confirm(story, "a1")
    assert isinstance(state_of(story), rollouts.Completed)


@pytest.mark.parametrize("name", ["downloading", "verified", "staged", "smoke_tested", "active"])
def test_nothing_short_of_confirmed_counts_as_success(name: NodePhase) -> None:
    story = started()
    story.tell(phase("e1", name))
    assert view_of(story).regions[0].confirmed == 0
    assert "e2" not in nodes_of(story)


# Errors


def test_a_failing_canary_takes_the_release_back_under_a_higher_counter() -> None:
    story = started(previous={"e1": ref("f")})
    commands = story.tell(phase("e1", "failed", "smoke inference: output differs"))
    assert commands == (SetDesired("e1", "m", 2, "ro-1", ref("f"), None, waves.BACK),)
    assert isinstance(state_of(story), rollouts.RolledBack)
    assert "smoke inference" in state_of(story).reason
    assert "1 of 1 attempted nodes failed" in state_of(story).reason


def test_a_roll_back_without_a_previous_release_stops_serving() -> None:
    (command,) = started().tell(phase("e1", "failed"))
    assert command.release is None


def test_a_roll_back_is_owed_until_each_node_confirmed_it() -> None:
    def backs(story: Story) -> list[str]:
        return [c.node for c in story.pending_commands() if isinstance(c, SetDesired)]

    story = started(wave("eu", "", "e1 e2"))
    story.tell(phase("e1", "failed"))
    assert backs(story) == ["e1", "e2"]
    story.tell(phase("e1", "confirmed", counter=2))
    assert backs(story) == ["e2"]
    story.tell(phase("e2", "confirmed", counter=1))
    assert backs(story) == ["e2"]


def test_the_denominator_is_the_attempted_never_the_enrolled() -> None:
    story = started(wave("eu", "", "a b c d e f g h i j"), max_error=0.4)
    story.tell(phase("a", "failed"))
    assert isinstance(state_of(story), rollouts.RolledBack)


def test_an_error_share_within_the_limit_goes_on() -> None:
    story = started(wave("eu", "", "a b c"), max_error=0.4, min_success=0.6, min_attempted=3)
    story.tell(phase("a", "failed"), phase("b", "confirmed"), phase("c", "confirmed"))
    assert isinstance(state_of(story), rollouts.Completed)


def test_everything_ended_but_too_little_success_pauses_and_does_not_promote() -> None:
    story = started(wave("eu", "", "a b c"), wave("us", "", "u"), max_error=0.5, min_success=0.9, min_attempted=3)
    story.tell(phase("a", "failed"), phase("b", "confirmed"), phase("c", "confirmed"))
    assert "2 of 3 confirmed" in state_of(story).reason
    assert "u" not in nodes_of(story)
    story.tell(RolloutResumeRequested(rollout="ro-1"))
    assert isinstance(state_of(story), rollouts.Paused)
    assert offers(story.tell(RolloutPromoteRequested(rollout="ro-1"))) == ["u"]


def test_rollback_wave_takes_back_one_wave_and_keeps_the_others() -> None:
    story = started(wave("eu", "", "e1"), wave("us", "", "u1 u2"), wave("ap", "", "a1"), on_failure="rollback_wave")
    confirm(story, "e1")
    commands = story.tell(phase("u1", "failed"))
    assert [(c.node, c.counter) for c in commands] == [("u1", 2), ("u2", 2)]
    assert isinstance(state_of(story), rollouts.Paused)
    backs = [c.node for c in story.pending_commands() if isinstance(c, SetDesired) and c.counter == 2]
    assert backs == ["u1", "u2"]
    assert offers(story.tell(RolloutResumeRequested(rollout="ro-1"))) == ["a1"]


def test_on_failure_pause_leaves_the_release_where_it_is() -> None:
    story = started(wave("eu", "", "e1 e2"), on_failure="pause", max_error=0.4)
    confirm(story, "e1")
    assert story.tell(phase("e2", "failed")) == ()
    assert isinstance(state_of(story), rollouts.Paused)


def test_runs_whose_base_was_withdrawn_are_cancelled() -> None:
    story = started(wave("eu", "", "e1"))
    story.tell(requested("run-1", base=ref("e")), requested("run-2", base=ref("d")))
    story.tell(requested("run-3", base=ref("e"), purpose="evaluate"))
    commands = story.tell(phase("e1", "failed"))
    assert [c.run for c in commands if isinstance(c, CancelRun)] == ["run-1"]
    assert [c.run for c in story.pending_commands() if isinstance(c, CancelRun)] == ["run-1"]


# Absent and stuck nodes


def test_offline_nodes_leave_the_wave_at_the_claim_deadline_and_do_not_dilute_it() -> None:
    story = started(wave("eu", "", "a b"), wave("us", "", "u"))
    confirm(story, "a")
    assert offers(story.ring()) == ["u"]
    assert nodes_of(story)["b"].reason.startswith("did not take the release")


def test_a_node_that_took_the_release_and_hangs_is_a_failure_not_an_absence() -> None:
    story = started(wave("eu", "", "a b"))
    confirm(story, "a")
    story.tell(phase("b", "downloading"))
    story.ring()
    assert isinstance(state_of(story), rollouts.RolledBack)
    assert "stuck in downloading" in state_of(story).reason


def test_a_wave_in_which_nobody_attempted_fails_closed() -> None:
    story = started(wave("eu", "", "a b"), wave("us", "", "u"))
    story.ring()
    assert "0 nodes attempted" in state_of(story).reason


def test_a_node_that_returns_is_served_by_the_catch_up_cohort_few_at_a_time() -> None:
    story = started(wave("eu", "", "a b c"), catch_up_in_flight=1)
    story.tell(joined("a"), joined("b"), joined("c"))
    story.tell(NodeOffline(node="b", reason="gone"), NodeOffline(node="c", reason="gone"))
    confirm(story, "a")
    story.ring()
    assert isinstance(state_of(story), rollouts.Completed)
    assert offers(story.tell(NodeOnline(node="b"))) == ["b"]
    assert offers(story.tell(NodeOnline(node="c"))) == []
    commands = confirm(story, "b")
    assert offers(commands) == ["c"]
    assert [c.node for c in commands if isinstance(c, SetDesired) and c.expires_at is None] == ["b"]
    assert "catch_up" in {s.stage for s in nodes_of(story).values()}


def test_errors_of_the_catch_up_cohort_take_the_release_back_everywhere() -> None:
    story = started(wave("eu", "", "a b"))
    story.tell(joined("a"), joined("b"), NodeOffline(node="b", reason="gone"))
    confirm(story, "a")
    story.ring()
    story.tell(NodeOnline(node="b"))
    story.tell(phase("b", "failed", "no room"))
    assert isinstance(state_of(story), rollouts.RolledBack)
    assert "catch-up" in state_of(story).reason


def test_a_node_that_joins_later_gets_the_release_too_and_goes_back_to_what_most_served() -> None:
    story = started(wave("eu", "", "a"), fallback=ref("f"))
    confirm(story, "a")
    assert offers(story.tell(joined("late"))) == ["late"]
    assert offers(story.tell(joined("elsewhere", "us"))) == []
    commands = story.tell(RolloutRollbackRequested(rollout="ro-1"))
    assert {c.node: c.release for c in commands if isinstance(c, SetDesired)} == {"a": None, "late": ref("f")}


def test_a_node_that_joins_after_a_roll_back_gets_what_the_others_went_back_to() -> None:
    story = started(wave("eu", "", "a"), fallback=ref("f"), previous={"a": ref("f")})
    story.tell(phase("a", "failed"))
    (command,) = [c for c in story.tell(joined("late")) if isinstance(c, SetDesired)]
    assert (command.node, command.release, command.counter) == ("late", ref("f"), 2)
    assert command in story.pending_commands()
    story.tell(phase("late", "confirmed", counter=2))
    assert command not in story.pending_commands()
    story.tell(rollout(wave("eu", "", "a"), key="ro-2", counter=3))
    assert not [c for c in story.tell(joined("later")) if isinstance(c, SetDesired) and c.rollout == "ro-1"]


def test_a_stuck_node_is_not_offered_again_by_itself_but_by_retry() -> None:
    story = started(wave("eu", "", "a b"), max_error=0.5, min_success=0.5)
    story.tell(phase("a", "failed"))
    assert isinstance(state_of(story), rollouts.RolledBack)
    story = started(wave("eu", "", "a b"), max_error=0.5, min_success=0.5)
    confirm(story, "b")
    story.tell(phase("a", "failed"))
    assert isinstance(state_of(story), rollouts.Completed)
    commands = story.tell(RolloutRetryRequested(rollout="ro-1", counter=3))
    assert [(c.node, c.counter) for c in commands if isinstance(c, SetDesired)] == [("a", 3)]
    assert story.world.model("m").counter == 4
    story.tell(phase("a", "confirmed", counter=1))
    assert nodes_of(story)["a"].phase == "offered"
    confirm(story, "a", counter=3)
    assert nodes_of(story)["a"].phase == "confirmed"


# Durability


def test_reports_under_another_counter_do_not_count() -> None:
    story = started()
    confirm(story, "e1", counter=7)
    assert nodes_of(story)["e1"].phase == "offered"


def test_a_restart_offers_again_exactly_the_nodes_that_are_not_done() -> None:
    story = started()
    confirm(story, "e1", "e2")
    assert offers(story.pending_commands()) == ["e3"]


def test_nodes_of_a_wave_that_is_over_find_the_release_without_a_deadline() -> None:
    story = started(wave("eu", "", "a"), terms=Terms(holdout=50, shadow=0.5))
    (settled,) = [c for c in confirm(story, "a") if isinstance(c, SetDesired)]
    assert settled.expires_at is None
    assert (settled.terms.holdout, settled.terms.shadow) == (0, 0)
    assert settled in rollouts.kept_states(story.world.rollouts["ro-1"])


def test_a_roll_out_that_is_over_and_settled_owes_nothing() -> None:
    story = started(wave("eu", "", "a b"))
    confirm(story, "a", "b")
    assert story.pending_commands() == [SettleNodes("ro-1", ("a", "b"))]
    story.tell(RolloutSettled(rollout="ro-1", nodes=["a"]))
    assert story.pending_commands() == [SettleNodes("ro-1", ("b",))]
    story.tell(RolloutSettled(rollout="ro-1", nodes=["b"]))
    assert story.pending_commands() == []
    story.tell(joined("late"))
    assert [c.node for c in story.pending_commands() if isinstance(c, SetDesired)] == ["late"]
    assert SettleNodes("ro-1", ("late",)) in story.tell(phase("late", "confirmed"))
    assert story.pending_commands() == [SettleNodes("ro-1", ("late",))]
    story.tell(RolloutSettled(rollout="ro-1", nodes=["late"]))
    assert story.pending_commands() == []


def test_a_superseded_roll_out_settles_the_nodes_that_keep_its_release_once() -> None:
    story = started(wave("eu", "a", "b"), bake=Bake(seconds=60))
    confirm(story, "a")
    story.tell(rollout(wave("us", "", "u"), key="ro-2", counter=3))
    assert SettleNodes("ro-1", ("a",)) in story.pending_commands()
    story.tell(RolloutSettled(rollout="ro-1", nodes=["a"]))
    assert SettleNodes("ro-1", ("a",)) not in story.pending_commands()


def test_a_roll_out_that_was_never_started_is_refused() -> None:
    with pytest.raises(InvalidTransition):
        Story().tell(phase("a", "confirmed"))


def test_the_alarm_of_a_stage_that_is_over_changes_nothing() -> None:
    story = started()
    (old,) = [c for c in story.pending_commands() if isinstance(c, SetAlarm)]
    story.ring()
    before = state_of(story)
    assert story.world.wants_alarm("rollout", "ro-1", old.key) is False
    assert state_of(story) == before


def test_a_roll_back_gives_each_node_what_it_served_before_also_after_a_superseded_roll_out() -> None:
    story = started(wave("eu", "", "a b"), previous={})
    confirm(story, "a")
    assert {m: dict(nodes) for m, nodes in story.world.serving.items()} == {"m": {"a": ref("e")}}
    story.tell(rollout(wave("eu", "a", "b"), key="ro-2", counter=3, previous=story.world.serving["m"]))
    (command,) = story.tell(phase("a", "failed", counter=3, key="ro-2"))
    assert command.release == ref("e")
    story.tell(phase("a", "confirmed", counter=4, key="ro-2"))
    assert {m: dict(nodes) for m, nodes in story.world.serving.items()} == {"m": {"a": ref("e")}}


PHASES = st.sampled_from(sorted(waves.ENDED | {"downloading", "active", "staged"}))
NODES = st.sampled_from(["e1", "e2", "e3", "u1", "u2", "stranger"])
REPORTS = st.lists(st.tuples(NODES, PHASES), max_size=25)


@given(REPORTS)
def test_redelivery_changes_nothing_and_a_replay_gives_the_same_world(reports: list[tuple[str, NodePhase]]) -> None:
    story = started(max_error=0.3)
    for node, name in reports:
        story.tell(phase(node, name))
        once, owed = nodes_of(story), story.pending_commands()
        apply(story.world, story.event(phase(node, name)))
        assert nodes_of(story) == once
        assert story.pending_commands() == owed
    assert story.replayed().rollouts == story.world.rollouts


@given(REPORTS)
def test_no_wave_opens_before_the_one_before_it_succeeded(reports: list[tuple[str, NodePhase]]) -> None:
    story = started(max_error=0.3)
    for node, name in reports:
        story.tell(phase(node, name))
    nodes = nodes_of(story)
    if "u1" in nodes:
        ended = [nodes[n].phase for n in ("e1", "e2", "e3") if nodes[n].stage != "catch_up"]
        assert all(p in waves.ENDED for p in ended)
        assert "confirmed" in ended


@given(REPORTS, st.sampled_from([None, RolloutPauseRequested(rollout="ro-1"), RolloutAbortRequested(rollout="ro-1")]))
def test_a_snapshot_in_any_state_is_the_same_roll_out(reports: list[tuple[str, NodePhase]], wish: Any) -> None:
    story = started(max_error=0.3, on_failure="rollback_wave", gates=[PairedGate()], bake=Bake(seconds=5))
    for node, name in reports:
        story.tell(phase(node, name))
    if isinstance(state_of(story), rollouts.Rolling) and wish is not None:
        story.tell(wish)
    snapshot = world_codec.Snapshot(1, 1, story.world, [])
    assert world_codec.decode(world_codec.encode(snapshot)).world.rollouts == story.world.rollouts
