"""Roll-outs: one sentence a rule, and the traps that real systems fell into."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator import rollout_views, rollouts, waves, world_codec
from coordinator.commands import CacheRelease, CancelRun, SetAlarm, SetDesired
from fabric.errors import InvalidTransition
from fabric.events import NodeOffline, NodeOnline
from fabric.rollout_events import (
    RolloutAbortRequested,
    RolloutNextRequested,
    RolloutPauseRequested,
    RolloutPromoteRequested,
    RolloutResumeRequested,
    RolloutRetryRequested,
    RolloutRollbackRequested,
)
from fabric.rollout_plan import Bake, MetricGate, NodePhase, PairedGate, Rate, Terms
from fabric.windows import Window
from tests.scenarios.build import (
    START,
    Story,
    cached,
    joined,
    measured,
    phase,
    ref,
    requested,
    rollout,
    wave,
)

TWO_WAVES = (wave("eu", "e1", "e2 e3"), wave("us", "", "u1 u2"))


def _started(*told: Any, **plan: Any) -> Story:
    story = Story()
    story.tell(rollout(*(told or TWO_WAVES), **plan))
    return story


def _state(story: Story) -> Any:
    return story.world.rollout("ro-1")


def _nodes(story: Story) -> dict[str, waves.NodeState]:
    return dict(rollouts.nodes_of(_state(story)))


def _view(story: Story) -> dict[str, Any]:
    return rollout_views.rollout(_state(story))


def _offers(commands: Any) -> list[str]:
    """Who is offered a release, with a deadline."""
    return [c.node for c in commands if isinstance(c, SetDesired) and c.expires_at is not None]


def _confirm(story: Story, *names: str, counter: int = 1) -> tuple[Any, ...]:
    return story.tell(*(phase(n, "confirmed", counter=counter) for n in names))


# Waves and their order


def test_only_the_canaries_of_the_first_wave_are_offered_first() -> None:
    commands = _started().tell(cached("us"))
    assert commands == ()
    story = Story()
    commands = story.tell(rollout(*TWO_WAVES))
    assert _offers(commands) == ["e1"]
    (clock,) = [c for c in commands if isinstance(c, SetAlarm) and c.key == "rolling-0"][-1:]
    assert clock.due == story.events[-1].time + timedelta(seconds=300)


def test_no_node_is_offered_the_release_before_its_region_has_every_chunk() -> None:
    story = Story()
    commands = story.tell(rollout(*TWO_WAVES), caches=False)
    assert [type(c) for c in commands] == [CacheRelease, SetAlarm]
    assert [type(c) for c in story.owed()] == [CacheRelease, SetAlarm]
    assert _offers(story.tell(cached("eu", wan_bytes=77))) == ["e1"]
    assert _view(story)["regions"][0]["wan_bytes"] == 77


def test_a_region_whose_leaf_gets_nothing_pauses_the_roll_out() -> None:
    story = Story()
    story.tell(rollout(*TWO_WAVES, cache_deadline_s=60), caches=False)
    story.ring()
    assert "leaf has not got the release" in _state(story).reason


def test_waves_go_in_region_order_and_each_waits_for_the_one_before() -> None:
    story = _started()
    assert _offers(_confirm(story, "e1")) == ["e2", "e3"]
    assert _offers(_confirm(story, "e2")) == []
    assert _offers(_confirm(story, "e3")) == ["u1", "u2"]
    _confirm(story, "u1", "u2")
    assert isinstance(_state(story), rollouts.Completed)
    assert [w.seconds > 0 for w in _state(story).waves] == [True, True]


def test_waves_of_one_group_go_side_by_side() -> None:
    us, ap = (wave(r, "", n).model_copy(update={"group": 1}) for r, n in (("us", "u1"), ("ap", "a1")))
    story = _started(wave("eu", "", "e1"), us, ap)
    assert sorted(_offers(_confirm(story, "e1"))) == ["a1", "u1"]
    _confirm(story, "u1")
    assert isinstance(_state(story), rollouts.Rolling)
    _confirm(story, "a1")
    assert isinstance(_state(story), rollouts.Completed)


@pytest.mark.parametrize("name", ["downloading", "verified", "staged", "smoke_tested", "active"])
def test_nothing_short_of_confirmed_counts_as_success(name: NodePhase) -> None:
    story = _started()
    story.tell(phase("e1", name))
    assert _view(story)["regions"][0]["confirmed"] == 0
    assert "e2" not in _nodes(story)


# Errors


def test_a_failing_canary_takes_the_release_back_under_a_higher_counter() -> None:
    story = _started(previous={"e1": ref("f")})
    commands = story.tell(phase("e1", "failed", "smoke inference: output differs"))
    assert commands == (SetDesired("e1", "m", 2, "ro-1", ref("f"), None, waves.BACK),)
    assert isinstance(_state(story), rollouts.RolledBack)
    assert "smoke inference" in _state(story).reason
    assert "1 of 1 attempted nodes failed" in _state(story).reason


def test_a_roll_back_without_a_previous_release_stops_serving() -> None:
    (command,) = _started().tell(phase("e1", "failed"))
    assert command.release is None


def test_a_roll_back_is_owed_until_each_node_confirmed_it() -> None:
    def backs(story: Story) -> list[str]:
        return [c.node for c in story.owed() if isinstance(c, SetDesired)]

    story = _started(wave("eu", "", "e1 e2"))
    story.tell(phase("e1", "failed"))
    assert backs(story) == ["e1", "e2"]
    story.tell(phase("e1", "confirmed", counter=2))
    assert backs(story) == ["e2"]
    story.tell(phase("e2", "confirmed", counter=1))
    assert backs(story) == ["e2"]


def test_the_denominator_is_the_attempted_never_the_enrolled() -> None:
    story = _started(wave("eu", "", "a b c d e f g h i j"), max_error=0.4)
    story.tell(phase("a", "failed"))
    assert isinstance(_state(story), rollouts.RolledBack)


def test_an_error_share_within_the_limit_goes_on() -> None:
    story = _started(wave("eu", "", "a b c"), max_error=0.4, min_success=0.6, min_attempted=3)
    story.tell(phase("a", "failed"), phase("b", "confirmed"), phase("c", "confirmed"))
    assert isinstance(_state(story), rollouts.Completed)


def test_everything_ended_but_too_little_success_pauses_and_does_not_promote() -> None:
    story = _started(wave("eu", "", "a b c"), wave("us", "", "u"), max_error=0.5, min_success=0.9, min_attempted=3)
    story.tell(phase("a", "failed"), phase("b", "confirmed"), phase("c", "confirmed"))
    assert "2 of 3 confirmed" in _state(story).reason
    assert "u" not in _nodes(story)
    story.tell(RolloutResumeRequested(rollout="ro-1"))
    assert isinstance(_state(story), rollouts.Paused)
    assert _offers(story.tell(RolloutPromoteRequested(rollout="ro-1"))) == ["u"]


def test_rollback_wave_takes_back_one_wave_and_keeps_the_others() -> None:
    story = _started(wave("eu", "", "e1"), wave("us", "", "u1 u2"), wave("ap", "", "a1"), on_failure="rollback_wave")
    _confirm(story, "e1")
    commands = story.tell(phase("u1", "failed"))
    assert [(c.node, c.counter) for c in commands] == [("u1", 2), ("u2", 2)]
    assert isinstance(_state(story), rollouts.Paused)
    backs = [c.node for c in story.owed() if isinstance(c, SetDesired) and c.counter == 2]
    assert backs == ["u1", "u2"]
    assert _offers(story.tell(RolloutResumeRequested(rollout="ro-1"))) == ["a1"]


def test_on_failure_pause_leaves_the_release_where_it_is() -> None:
    story = _started(wave("eu", "", "e1 e2"), on_failure="pause", max_error=0.4)
    _confirm(story, "e1")
    assert story.tell(phase("e2", "failed")) == ()
    assert isinstance(_state(story), rollouts.Paused)


def test_runs_whose_base_was_withdrawn_are_cancelled() -> None:
    story = _started(wave("eu", "", "e1"))
    story.tell(requested("run-1", base=ref("e")), requested("run-2", base=ref("d")))
    story.tell(requested("run-3", base=ref("e"), purpose="evaluate"))
    commands = story.tell(phase("e1", "failed"))
    assert [c.run for c in commands if isinstance(c, CancelRun)] == ["run-1"]
    assert [c.run for c in story.owed() if isinstance(c, CancelRun)] == ["run-1"]


# Absent and stuck nodes


def test_offline_nodes_leave_the_wave_at_the_claim_deadline_and_do_not_dilute_it() -> None:
    story = _started(wave("eu", "", "a b"), wave("us", "", "u"))
    _confirm(story, "a")
    assert _offers(story.ring()) == ["u"]
    assert _nodes(story)["b"].reason.startswith("did not take the release")


def test_a_node_that_took_the_release_and_hangs_is_a_failure_not_an_absence() -> None:
    story = _started(wave("eu", "", "a b"))
    _confirm(story, "a")
    story.tell(phase("b", "downloading"))
    story.ring()
    assert isinstance(_state(story), rollouts.RolledBack)
    assert "stuck in downloading" in _state(story).reason


def test_a_wave_in_which_nobody_attempted_fails_closed() -> None:
    story = _started(wave("eu", "", "a b"), wave("us", "", "u"))
    story.ring()
    assert "0 nodes attempted" in _state(story).reason


def test_a_node_that_returns_is_served_by_the_catch_up_cohort_few_at_a_time() -> None:
    story = _started(wave("eu", "", "a b c"), catch_up_in_flight=1)
    story.tell(joined("a"), joined("b"), joined("c"))
    story.tell(NodeOffline(node="b", reason="gone"), NodeOffline(node="c", reason="gone"))
    _confirm(story, "a")
    story.ring()
    assert isinstance(_state(story), rollouts.Completed)
    assert _offers(story.tell(NodeOnline(node="b"))) == ["b"]
    assert _offers(story.tell(NodeOnline(node="c"))) == []
    commands = _confirm(story, "b")
    assert _offers(commands) == ["c"]
    assert [c.node for c in commands if isinstance(c, SetDesired) and c.expires_at is None] == ["b"]
    assert "catch_up" in {s.stage for s in _nodes(story).values()}


def test_errors_of_the_catch_up_cohort_take_the_release_back_everywhere() -> None:
    story = _started(wave("eu", "", "a b"))
    story.tell(joined("a"), joined("b"), NodeOffline(node="b", reason="gone"))
    _confirm(story, "a")
    story.ring()
    story.tell(NodeOnline(node="b"))
    story.tell(phase("b", "failed", "no room"))
    assert isinstance(_state(story), rollouts.RolledBack)
    assert "catch-up" in _state(story).reason


def test_a_node_that_joins_later_gets_the_release_too_and_goes_back_to_what_most_served() -> None:
    story = _started(wave("eu", "", "a"), fallback=ref("f"))
    _confirm(story, "a")
    assert _offers(story.tell(joined("late"))) == ["late"]
    assert _offers(story.tell(joined("elsewhere", "us"))) == []
    commands = story.tell(RolloutRollbackRequested(rollout="ro-1"))
    assert {c.node: c.release for c in commands if isinstance(c, SetDesired)} == {"a": None, "late": ref("f")}


def test_a_stuck_node_is_not_offered_again_by_itself_but_by_retry() -> None:
    story = _started(wave("eu", "", "a b"), max_error=0.5, min_success=0.5)
    story.tell(phase("a", "failed"))
    assert isinstance(_state(story), rollouts.RolledBack)
    story = _started(wave("eu", "", "a b"), max_error=0.5, min_success=0.5)
    _confirm(story, "b")
    story.tell(phase("a", "failed"))
    assert isinstance(_state(story), rollouts.Completed)
    commands = story.tell(RolloutRetryRequested(rollout="ro-1", counter=3))
    assert [(c.node, c.counter) for c in commands if isinstance(c, SetDesired)] == [("a", 3)]
    assert story.world.model("m").counter == 4
    story.tell(phase("a", "confirmed", counter=1))
    assert _nodes(story)["a"].phase == "offered"
    _confirm(story, "a", counter=3)
    assert _nodes(story)["a"].phase == "confirmed"


# Rate and windows


def test_the_rate_bounds_offers_and_grows_with_success() -> None:
    names = " ".join(f"n{i}" for i in range(10))
    story = Story()
    first = story.tell(rollout(wave("eu", "", names), rate=Rate(per_minute=1, growth=2)))
    assert _offers(first) == ["n0"]
    assert _offers(story.ring()) == ["n1"]
    _confirm(story, "n0", "n1")
    at = story.events[-1].time
    offered = [name for _ in range(4) for name in _offers(story.ring())]
    assert offered == ["n2", "n3", "n4", "n5"]
    assert (story.events[-1].time - at).total_seconds() == pytest.approx(60, abs=2)


def test_no_more_nodes_than_allowed_are_in_flight() -> None:
    story = Story()
    assert len(_offers(story.tell(rollout(wave("eu", "", "a b c d"), rate=Rate(in_flight=2))))) == 2
    assert _offers(_confirm(story, "a")) == ["c"]


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
    assert _offers(commands) == []
    assert _offers(story.ring()) == ["berlin"]
    assert story.events[-1].time == datetime(2026, 1, 1, 1, 0, tzinfo=UTC)
    _confirm(story, "berlin")
    while not (offered := _offers(story.ring())):
        pass
    assert offered == ["tokyo"]
    assert story.events[-1].time == datetime(2026, 1, 1, 17, 0, tzinfo=UTC)


# Bake and gates


def test_a_bake_needs_its_time_and_its_inferences() -> None:
    story = _started(bake=Bake(seconds=60, inferences=100))
    _confirm(story, "e1")
    story.tell(measured("e1", inferences=100))
    assert "e2" not in _nodes(story)
    assert _offers(story.ring()) == ["e2", "e3"]
    story = _started(bake=Bake(seconds=60, inferences=100))
    _confirm(story, "e1")
    story.ring()
    assert "e2" not in _nodes(story)
    assert _offers(story.tell(measured("e1", inferences=100))) == ["e2", "e3"]


def test_an_inconclusive_gate_does_not_promote_however_long_it_takes() -> None:
    story = _started(gates=[PairedGate()], gate_deadline_s=100)
    _confirm(story, "e1")
    story.tell(measured("e1", ties=5))
    assert "e2" not in _nodes(story)
    assert "needs about" in _view(story)["reason"]
    story.ring()
    assert isinstance(_state(story), rollouts.Paused)
    assert "still undecided" in _state(story).reason
    assert "e2" not in _nodes(story)


def test_an_inconclusive_gate_pauses_at_once_if_the_plan_says_so() -> None:
    story = _started(gates=[PairedGate()], on_inconclusive="pause")
    _confirm(story, "e1")
    assert isinstance(_state(story), rollouts.Paused)


def test_a_passing_gate_promotes_and_a_failing_one_takes_the_release_back() -> None:
    story = _started(gates=[PairedGate()])
    _confirm(story, "e1")
    assert _offers(story.tell(measured("e1", ties=600, wins=3, losses=2))) == ["e2", "e3"]
    story = _started(gates=[PairedGate()])
    _confirm(story, "e1")
    story.tell(measured("e1", ties=400, losses=40))
    assert isinstance(_state(story), rollouts.RolledBack)
    assert all(word in _state(story).reason for word in ("eu, canary", "paired", "-0.09", "allowed -0.02", "n 440"))


def test_a_gate_that_cannot_be_evaluated_is_an_error_and_never_a_pass() -> None:
    story = _started(gates=[MetricGate(pass_if="no_such_field < 1")])
    _confirm(story, "e1")
    assert isinstance(_state(story), rollouts.Paused)
    assert "cannot be judged" in _state(story).reason
    assert "e2" not in _nodes(story)


def test_a_gate_that_is_not_enforced_is_shown_and_has_no_effect() -> None:
    story = _started(gates=[PairedGate(enforce=False), MetricGate(pass_if="nonsense > 0", enforce=False)])
    assert _offers(_confirm(story, "e1")) == ["e2", "e3"]
    assert [g["outcome"] for g in _view(story)["regions"][0]["gates"]] == ["inconclusive", "error"]


def test_the_worst_slice_decides() -> None:
    story = _started(
        wave("eu", "x86 arm", "e2"),
        gates=[PairedGate(slices=["hardware"])],
        slices={"hardware=x86": ["x86", "e2"], "hardware=arm": ["arm"]},
    )
    _confirm(story, "x86", "arm")
    story.tell(measured("x86", ties=100_000, wins=900))
    assert "hardware=arm" in _view(story)["reason"]
    story.tell(measured("arm", ties=300, losses=60))
    assert isinstance(_state(story), rollouts.RolledBack)
    assert "hardware=arm" in _state(story).reason


def test_errors_are_judged_before_gates_that_pass() -> None:
    story = _started(wave("eu", "a b", "c"), gates=[PairedGate()])
    story.tell(phase("a", "confirmed"), measured("a", ties=10_000), phase("b", "failed"))
    assert isinstance(_state(story), rollouts.RolledBack)


# What people ask for


def test_an_abort_is_honoured_in_every_stage_and_takes_everything_back() -> None:
    for before in ([], [phase("e1", "downloading")], [phase("e1", "active")], [phase("e1", "confirmed")]):
        story = _started()
        story.tell(*before)
        offered = set(_nodes(story))
        commands = story.tell(RolloutAbortRequested(rollout="ro-1"))
        assert {c.node for c in commands} == offered
        assert _state(story).reason.startswith("aborted")


def test_a_pause_offers_nothing_loses_no_report_and_goes_on_where_it_was() -> None:
    story = _started()
    story.tell(RolloutPauseRequested(rollout="ro-1", reason="lunch"))
    assert _confirm(story, "e1") == ()
    assert "lunch" in _state(story).reason
    assert _offers(story.tell(RolloutResumeRequested(rollout="ro-1"))) == ["e2", "e3"]


def test_a_paused_roll_out_is_still_taken_back_when_nodes_fail() -> None:
    story = _started()
    story.tell(RolloutPauseRequested(rollout="ro-1"), phase("e1", "failed"))
    assert isinstance(_state(story), rollouts.RolledBack)


def test_a_deadline_does_not_run_out_during_a_pause() -> None:
    story = _started(wave("eu", "", "a b"))
    story.tell(RolloutPauseRequested(rollout="ro-1"))
    story.tell(phase("a", "confirmed"), after_s=5000)
    story.tell(RolloutResumeRequested(rollout="ro-1"))
    assert _nodes(story)["b"].phase == "offered"


def test_an_approval_is_waited_for_and_given_region_by_region() -> None:
    guarded = wave("us", "", "u1").model_copy(update={"approval": True, "group": 1})
    story = _started(wave("eu", "", "e1"), guarded)
    assert _offers(_confirm(story, "e1")) == []
    assert "approval" in _view(story)["reason"]
    with pytest.raises(InvalidTransition):
        story.tell(RolloutPromoteRequested(rollout="ro-1", region="eu"))
    assert _offers(story.tell(RolloutPromoteRequested(rollout="ro-1", region="us"))) == ["u1"]


def test_canaries_wait_for_an_approval_that_a_plan_wants() -> None:
    story = _started(approve_after_canary=True)
    assert _offers(_confirm(story, "e1")) == []
    assert _offers(story.tell(RolloutPromoteRequested(rollout="ro-1"))) == ["e2", "e3"]


def test_the_next_wave_can_be_started_by_hand() -> None:
    story = _started(wave("eu", "", "e1"), wave("us", "", "u1").model_copy(update={"group": 1}))
    assert _offers(story.tell(RolloutNextRequested(rollout="ro-1"))) == ["u1"]
    with pytest.raises(InvalidTransition):
        story.tell(RolloutNextRequested(rollout="ro-1"))


@pytest.mark.parametrize("wish", [RolloutPauseRequested, RolloutResumeRequested, RolloutAbortRequested])
def test_a_wish_that_makes_no_sense_any_more_is_refused(wish: Any) -> None:
    story = _started(wave("eu", "", "a"))
    _confirm(story, "a")
    with pytest.raises(InvalidTransition, match="completed"):
        story.tell(wish(rollout="ro-1"))


def test_a_newer_roll_out_of_the_model_supersedes_the_older_one() -> None:
    story = _started()
    story.tell(rollout(wave("eu", "", "e1"), key="ro-2", counter=3))
    assert isinstance(_state(story), rollouts.Superseded)
    assert story.world.model("m").counter == 4
    assert all(c.rollout == "ro-2" for c in story.owed() if isinstance(c, SetDesired))


def test_a_superseded_roll_out_serves_no_catch_up_cohort_and_is_not_rolled_back() -> None:
    story = _started(wave("eu", "", "a b"))
    _confirm(story, "a")
    story.ring()
    story.tell(joined("b"), NodeOffline(node="b", reason="gone"))
    story.tell(rollout(wave("eu", "", "a"), key="ro-2", counter=3))
    assert _offers(story.tell(NodeOnline(node="b"))) == []
    with pytest.raises(InvalidTransition):
        story.tell(RolloutRollbackRequested(rollout="ro-1"))


# Durability


def test_reports_under_another_counter_do_not_count() -> None:
    story = _started()
    _confirm(story, "e1", counter=7)
    assert _nodes(story)["e1"].phase == "offered"


def test_a_restart_offers_again_exactly_the_nodes_that_are_not_done() -> None:
    story = _started()
    _confirm(story, "e1", "e2")
    assert _offers(story.owed()) == ["e3"]


def test_nodes_of_a_wave_that_is_over_find_the_release_without_a_deadline() -> None:
    story = _started(wave("eu", "", "a"), terms=Terms(holdout=50, shadow=0.5))
    (settled,) = [c for c in _confirm(story, "a") if isinstance(c, SetDesired)]
    assert settled.expires_at is None
    assert (settled.terms.holdout, settled.terms.shadow) == (0, 0)
    assert settled in story.owed()


def test_a_roll_out_that_was_never_started_is_refused() -> None:
    with pytest.raises(InvalidTransition):
        Story().tell(phase("a", "confirmed"))


def test_the_alarm_of_a_stage_that_is_over_changes_nothing() -> None:
    story = _started()
    (old,) = [c for c in story.owed() if isinstance(c, SetAlarm)]
    story.ring()
    before = _state(story)
    assert story.world.wants_alarm("rollout", "ro-1", old.key) is False
    assert _state(story) == before


def test_a_roll_back_gives_each_node_what_it_served_before_also_after_a_superseded_roll_out() -> None:
    story = _started(wave("eu", "", "a b"), previous={})
    _confirm(story, "a")
    assert story.world.serving == {"m": {"a": ref("e")}}
    story.tell(rollout(wave("eu", "a", "b"), key="ro-2", counter=3, previous=story.world.serving["m"]))
    (command,) = story.tell(phase("a", "failed", counter=3, key="ro-2"))
    assert command.release == ref("e")
    story.tell(phase("a", "confirmed", counter=4, key="ro-2"))
    assert story.world.serving == {"m": {"a": ref("e")}}


PHASES = st.sampled_from(sorted(waves.ENDED | {"downloading", "active", "staged"}))
NODES = st.sampled_from(["e1", "e2", "e3", "u1", "u2", "stranger"])
REPORTS = st.lists(st.tuples(NODES, PHASES), max_size=25)


@given(REPORTS)
def test_redelivery_changes_nothing_and_a_replay_gives_the_same_world(reports: list[tuple[str, NodePhase]]) -> None:
    story = _started(max_error=0.3)
    for node, name in reports:
        story.tell(phase(node, name))
        once, owed = _nodes(story), story.owed()
        story.world.apply(story.event(phase(node, name)))
        assert _nodes(story) == once
        assert story.owed() == owed
    assert story.replayed().rollouts == story.world.rollouts


@given(REPORTS)
def test_no_wave_opens_before_the_one_before_it_succeeded(reports: list[tuple[str, NodePhase]]) -> None:
    story = _started(max_error=0.3)
    for node, name in reports:
        story.tell(phase(node, name))
    nodes = _nodes(story)
    if "u1" in nodes:
        ended = [nodes[n].phase for n in ("e1", "e2", "e3")]
        assert all(p in waves.ENDED for p in ended)
        assert "confirmed" in ended


@given(REPORTS, st.sampled_from([None, RolloutPauseRequested(rollout="ro-1"), RolloutAbortRequested(rollout="ro-1")]))
def test_a_snapshot_in_any_state_is_the_same_roll_out(reports: list[tuple[str, NodePhase]], wish: Any) -> None:
    story = _started(max_error=0.3, on_failure="rollback_wave", gates=[PairedGate()], bake=Bake(seconds=5))
    for node, name in reports:
        story.tell(phase(node, name))
    if isinstance(_state(story), rollouts.Rolling) and wish is not None:
        story.tell(wish)
    snapshot = world_codec.Snapshot(1, 1, story.world, [])
    assert world_codec.decode(world_codec.encode(snapshot)).world.rollouts == story.world.rollouts
