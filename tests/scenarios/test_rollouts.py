"""Roll-outs: one sentence a rule, and the traps that real systems fell into."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator import rollouts
from coordinator.commands import SetAlarm, SetDesired
from fabric.errors import InvalidTransition
from fabric.events import RolloutAbortRequested
from fabric.rollout_plan import NodePhase
from tests.scenarios.build import Story, alarm, phase, ref, rollout, wave

TWO_WAVES = (wave("eu", "e1", "e2 e3"), wave("us", "", "u1 u2"))


def _started(*waves: Any, **plan: Any) -> Story:
    story = Story()
    story.tell(rollout(*(waves or TWO_WAVES), **plan))
    return story


def _state(story: Story) -> Any:
    return story.world.rollout("ro-1")


def _offers(commands: tuple[Any, ...]) -> list[str]:
    return [c.node for c in commands if isinstance(c, SetDesired)]


def test_only_the_canaries_of_the_first_wave_are_offered_first() -> None:
    story = Story()
    commands = story.tell(rollout(*TWO_WAVES))
    assert _offers(commands) == ["e1"]
    (clock,) = [c for c in commands if isinstance(c, SetAlarm)]
    assert clock.due == story.events[0].time + timedelta(seconds=300)


def test_waves_go_in_region_order_and_each_waits_for_the_one_before() -> None:
    story = _started()
    assert _offers(story.tell(phase("e1", "confirmed"))) == ["e1", "e2", "e3"][1:]
    assert _offers(story.tell(phase("e2", "confirmed"))) == []
    assert _offers(story.tell(phase("e3", "confirmed"))) == ["u1", "u2"]
    story.tell(phase("u1", "confirmed"), phase("u2", "confirmed"))
    assert isinstance(_state(story), rollouts.Completed)
    assert len(_state(story).wave_seconds) == 2


@pytest.mark.parametrize("name", ["downloading", "verified", "staged", "smoke_tested", "active"])
def test_nothing_short_of_confirmed_counts_as_success(name: NodePhase) -> None:
    story = _started()
    story.tell(phase("e1", name))
    assert isinstance(_state(story), rollouts.Rolling)
    assert _state(story).stage == "canary"


def test_a_failing_canary_takes_the_release_back_under_a_higher_counter() -> None:
    story = _started(previous={"e1": ref("f")})
    commands = story.tell(phase("e1", "failed", "smoke inference: output differs"))
    assert commands == (SetDesired("e1", "m", 2, "ro-1", ref("f")),)
    assert isinstance(_state(story), rollouts.RolledBack)
    assert "smoke inference" in _state(story).reason
    assert "1 of 1 attempted nodes failed" in _state(story).reason


def test_a_roll_back_without_a_previous_release_stops_serving() -> None:
    story = _started()
    (command,) = story.tell(phase("e1", "failed"))
    assert command.release is None


def test_a_roll_back_is_owed_until_each_node_confirmed_it() -> None:
    story = _started(wave("eu", "", "e1 e2"))
    story.tell(phase("e1", "failed"))
    assert _offers(tuple(story.owed())) == ["e1", "e2"]
    story.tell(phase("e1", "confirmed", counter=2))
    assert _offers(tuple(story.owed())) == ["e2"]
    story.tell(phase("e2", "confirmed", counter=1))
    assert _offers(tuple(story.owed())) == ["e2"]


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
    assert isinstance(_state(story), rollouts.Paused)
    assert "2 of 3 confirmed" in _state(story).reason
    assert "u" not in _state(story).nodes


def test_offline_nodes_leave_the_wave_at_the_claim_deadline_and_do_not_dilute_it() -> None:
    story = _started(wave("eu", "", "a b"), wave("us", "", "u"))
    story.tell(phase("a", "confirmed"))
    assert _offers(story.tell(alarm("0-rest"))) == ["u"]
    assert _state(story).nodes["b"].reason.startswith("did not take the release")


def test_a_node_that_took_the_release_and_hangs_is_a_failure_not_an_absence() -> None:
    story = _started(wave("eu", "", "a b"))
    story.tell(phase("a", "confirmed"), phase("b", "downloading"), alarm("0-rest"))
    assert isinstance(_state(story), rollouts.RolledBack)
    assert "stuck in downloading" in _state(story).reason


def test_a_wave_in_which_nobody_attempted_fails_closed() -> None:
    story = _started(wave("eu", "", "a b"), wave("us", "", "u"))
    story.tell(alarm("0-rest"))
    assert isinstance(_state(story), rollouts.Paused)
    assert "0 nodes attempted" in _state(story).reason


def test_the_alarm_of_a_stage_that_is_over_changes_nothing() -> None:
    story = _started()
    story.tell(phase("e1", "confirmed"))
    before = _state(story)
    story.tell(alarm("0-canary"))
    assert _state(story) == before


def test_a_late_node_may_still_confirm_while_its_wave_is_open() -> None:
    story = _started(wave("eu", "", "a b c"))
    story.tell(phase("a", "confirmed"), alarm("0-rest"))
    assert isinstance(_state(story), rollouts.Completed)


def test_reports_under_another_counter_do_not_count() -> None:
    story = _started()
    story.tell(phase("e1", "confirmed", counter=7))
    assert _state(story).nodes["e1"].phase == "offered"


def test_an_abort_is_honoured_in_every_stage_and_takes_everything_back() -> None:
    story = _started()
    story.tell(phase("e1", "confirmed"), phase("e2", "active"))
    commands = story.tell(RolloutAbortRequested(rollout="ro-1"))
    assert _offers(commands) == ["e1", "e2", "e3"]
    assert _state(story).reason.startswith("aborted")


def test_a_newer_roll_out_of_the_model_supersedes_the_older_one() -> None:
    story = _started()
    story.tell(rollout(wave("eu", "", "e1"), key="ro-2", counter=3))
    assert isinstance(_state(story), rollouts.Superseded)
    assert story.world.model("m").counter == 4
    assert all(c.rollout == "ro-2" for c in story.owed() if isinstance(c, SetDesired))


def test_a_restart_offers_again_exactly_the_nodes_that_are_not_done() -> None:
    story = _started()
    story.tell(phase("e1", "confirmed"), phase("e2", "confirmed"))
    assert _offers(tuple(story.owed())) == ["e3"]


def test_a_roll_out_that_was_never_started_is_refused() -> None:
    with pytest.raises(InvalidTransition):
        Story().tell(phase("a", "confirmed"))


PHASES = st.sampled_from(sorted(rollouts.ENDED | {"downloading", "active", "staged"}))
NODES = st.sampled_from(["e1", "e2", "e3", "u1", "u2", "stranger"])


def test_a_roll_back_gives_each_node_what_it_served_before_also_after_a_superseded_roll_out() -> None:
    story = _started(wave("eu", "", "a b"), previous={})
    story.tell(phase("a", "confirmed"))
    assert story.world.serving == {"m": {"a": ref("e")}}
    story.tell(rollout(wave("eu", "a", "b"), key="ro-2", counter=3, previous=story.world.serving["m"]))
    (command,) = story.tell(phase("a", "failed", counter=3, key="ro-2"))
    assert command.release == ref("e")
    story.tell(phase("a", "confirmed", counter=4, key="ro-2"))
    assert story.world.serving == {"m": {"a": ref("e")}}


@given(st.lists(st.tuples(NODES, PHASES), max_size=25))
def test_redelivery_changes_nothing_and_a_replay_gives_the_same_world(reports: list[tuple[str, NodePhase]]) -> None:
    story = _started(max_error=0.3)
    for node, name in reports:
        story.tell(phase(node, name))
        once = _state(story)
        owed = story.owed()
        story.world.apply(story.event(phase(node, name)))
        assert _state(story).nodes == once.nodes
        assert type(_state(story)) is type(once)
        assert story.owed() == owed
    assert {k: type(v) for k, v in story.replayed().rollouts.items()} == {
        k: type(v) for k, v in story.world.rollouts.items()
    }


@given(st.lists(st.tuples(NODES, PHASES), max_size=25))
def test_no_wave_opens_before_the_one_before_it_succeeded(reports: list[tuple[str, NodePhase]]) -> None:
    story = _started(max_error=0.3)
    for node, name in reports:
        story.tell(phase(node, name))
    state = _state(story)
    if "u1" in state.nodes:
        ended = [state.nodes[n].phase for n in ("e1", "e2", "e3")]
        assert all(p in rollouts.ENDED for p in ended)
        assert "confirmed" in ended
