"""Runs and rounds, told as stories of events."""

from __future__ import annotations

from datetime import timedelta

import pytest

from fedtide.coordinator.commands import CleanUp, LaunchAggregator, StopAggregator, SuspendAggregator, TellTimeIsUp
from fedtide.coordinator.runs import rounds, runs, views
from fedtide.fabric.errors import InvalidTransition, NotFound
from fedtide.fabric.events.runs import (
    AggregatorExited,
    AggregatorStarted,
    AggregatorWaits,
    RoundsRestarted,
    RunCancelRequested,
    RunCleanedUp,
    RunCompleted,
    RunFailed,
    RunPauseRequested,
    RunRemoved,
    RunResumeRequested,
    RunStopRequested,
)
from fedtide.fabric.messages.views import RefusalView
from fedtide.fabric.plans.round_policy import RoundPolicy
from tests.scenarios.build import (
    START,
    Story,
    apply,
    closed,
    joined,
    opened,
    produced,
    published,
    received,
    refused,
    requested,
)


def test_a_request_launches_the_first_attempt() -> None:
    story = Story()
    (command,) = story.tell(requested())
    assert isinstance(command, LaunchAggregator)
    assert (command.run, command.attempt) == ("run-1", 1)


def test_a_run_goes_from_request_to_completion_with_its_books_in_order() -> None:
    story = Story()
    story.tell(requested(), AggregatorStarted(run="run-1", attempt=1), opened(1, "a", "b", "c"))
    story.tell(received(1, "a"), refused(1, "b"), received(1, "c"), closed(1, accuracy=0.9))
    assert story.tell(RunCompleted(run="run-1", attempt=1)) == (CleanUp("run-1"),)
    assert story.pending_commands() == [CleanUp("run-1")]
    story.tell(RunCleanedUp(run="run-1"))
    run = story.world.run("run-1")
    assert isinstance(run, runs.Ended)
    assert run.outcome == "completed"
    assert runs.participants(run) == {"a", "c"}
    assert runs.accepted_updates(run) == 2
    view = views.run(run, publishing=False, version=None, matching=3, doing=lambda _: "queued")
    assert view.rounds[0].phases["train"].refused["b"] == RefusalView(category="app_error", reason="because")
    assert story.pending_commands() == []


def test_an_update_counts_once_however_often_it_is_delivered() -> None:
    story = Story()
    story.tell(requested(), opened(1, "a"), received(1, "a"), received(1, "a"), refused(1, "a"))
    tally = story.world.run("run-1").rounds[1].phases["train"]
    assert (set(tally.received), tally.refused, tally.bytes_up) == ({"a"}, {}, 5)


def test_a_node_that_was_refused_is_not_counted_as_received_later() -> None:
    story = Story()
    story.tell(requested(), opened(1, "a"), refused(1, "a", "timeout"), received(1, "a"))
    assert story.world.run("run-1").rounds[1].phases["train"].received == frozenset()


def test_an_answer_after_its_task_was_given_up_is_counted_as_late_and_never_as_received() -> None:
    story = Story()
    story.tell(requested(), opened(1, "a", "b"), refused(1, "a", "timeout"), refused(1, "b"), closed(1))
    story.tell(refused(1, "a", "late"), refused(1, "b", "late"))
    tally = story.world.run("run-1").rounds[1].phases["train"]
    assert {n: r.category for n, r in tally.refused.items()} == {"a": "late", "b": "app_error"}
    assert tally.received == frozenset()


def test_a_crashed_aggregator_is_launched_again_as_the_next_attempt_and_keeps_its_rounds() -> None:
    story = Story()
    story.tell(requested(), opened(1, "a", "b"), received(1, "a"))
    command, *_ = story.tell(AggregatorExited(run="run-1", attempt=1, code=-9))
    assert command.attempt == 2
    before = story.world.run("run-1").rounds
    story.tell(opened(1, "a", "b", attempt=2), received(1, "a", attempt=2))
    assert story.world.run("run-1").rounds == before


def test_an_app_that_cannot_resume_begins_with_fresh_rounds_and_says_so() -> None:
    story = Story()
    story.tell(requested(), opened(1, "a"), AggregatorExited(run="run-1", attempt=1, code=-9))
    story.tell(RoundsRestarted(run="run-1", attempt=2))
    run = story.world.run("run-1")
    assert isinstance(run, runs.Running)
    assert dict(run.rounds) == {}
    assert "started again from its first round" in run.reason


def test_reports_of_an_attempt_that_was_given_up_change_nothing() -> None:
    story = Story()
    story.tell(requested(), AggregatorExited(run="run-1", attempt=1, code=1))
    before = story.world.run("run-1")
    story.tell(
        opened(1, "a", attempt=1),
        RunCompleted(run="run-1", attempt=1),
        AggregatorExited(run="run-1", attempt=1, code=1),
    )
    assert story.world.run("run-1") == before


def test_a_run_whose_aggregator_keeps_dying_fails_with_the_reason() -> None:
    story = Story()
    story.tell(requested())
    for attempt in range(1, runs.MAX_CRASHES + 1):
        story.tell(AggregatorExited(run="run-1", attempt=attempt, code=-9, reason="out of memory"))
    run = story.world.run("run-1")
    assert isinstance(run, runs.Ended)
    assert run.outcome == "failed"
    assert "out of memory" in run.reason


def test_an_aggregator_that_cannot_begin_says_why_and_ends_the_run_if_it_is_hopeless() -> None:
    story = Story()
    story.tell(requested(), AggregatorWaits(run="run-1", attempt=1, reason="3 Insufficient nvidia.com/gpu"))
    assert "Insufficient" in _reason(story)
    story.tell(AggregatorStarted(run="run-1", attempt=1))
    assert "Insufficient" not in _reason(story)
    story.tell(AggregatorExited(run="run-1", attempt=1, code=77, reason="no such image", hopeless=True))
    assert story.world.run("run-1").outcome == "failed"
    assert story.world.run("run-1").reason == "no such image"


def test_an_aggregator_that_ran_out_of_memory_gets_a_larger_machine() -> None:
    story = Story()
    story.tell(requested())
    for attempt in (1, 2):
        command, *_ = story.tell(AggregatorExited(run="run-1", attempt=attempt, code=137, out_of_memory=True))
        assert command.escalation == attempt
    command, *_ = story.tell(AggregatorExited(run="run-1", attempt=3, code=1))
    assert command.escalation == 2
    story.tell(RunPauseRequested(run="run-1"))
    command, *_ = story.tell(RunResumeRequested(run="run-1"))
    assert command.escalation == 2


def _reason(story: Story) -> str:
    state = story.world.run("run-1")
    return views.run(state, publishing=False, version=None, matching=lambda: 1, doing=lambda _: "").reason


def test_crashes_are_counted_anew_after_each_closed_round() -> None:
    story = Story()
    story.tell(requested())
    for attempt in range(1, 2 * runs.MAX_CRASHES):
        story.tell(opened(attempt, "a", attempt=attempt), closed(attempt, attempt=attempt))
        story.tell(AggregatorExited(run="run-1", attempt=attempt, code=-9))
    assert isinstance(story.world.run("run-1"), runs.Running)


def test_an_app_that_fails_is_not_tried_again() -> None:
    story = Story()
    story.tell(requested())
    assert story.tell(RunFailed(run="run-1", attempt=1, reason="ValueError")) == (StopAggregator("run-1"),)
    assert story.pending_commands() == [StopAggregator("run-1")]


def test_a_cancelled_run_stops_its_aggregator_also_after_a_restart_and_abandons_its_round() -> None:
    story = Story()
    story.tell(requested(), opened(1, "a"))
    assert story.tell(RunCancelRequested(run="run-1")) == (StopAggregator("run-1"),)
    assert story.pending_commands() == [StopAggregator("run-1")]
    assert isinstance(story.world.run("run-1").rounds[1], rounds.Abandoned)
    assert story.tell(RunCompleted(run="run-1", attempt=1)) == ()
    assert story.world.run("run-1").outcome == "cancelled"


def test_a_restart_asks_again_for_exactly_the_open_runs() -> None:
    story = Story()
    story.tell(requested("run-1"), requested("run-2"), RunCompleted(run="run-1", attempt=1))
    story.tell(RunCleanedUp(run="run-1"))
    assert [c.run for c in story.pending_commands()] == ["run-2"]


def test_a_replay_gives_the_same_world() -> None:
    story = Story()
    story.tell(requested(), opened(1, "a", "b"), received(1, "a"), refused(1, "b"), closed(1))
    assert story.replayed().runs == story.world.runs


def test_an_event_of_an_unknown_run_is_refused_and_changes_nothing() -> None:
    story = Story()
    with pytest.raises(InvalidTransition, match="never requested"):
        story.tell(opened(1, "a"))
    story.tell(requested())
    with pytest.raises(InvalidTransition, match="twice"):
        apply(story.world, story.event(requested()))
    assert len(story.world.runs) == 1


def test_a_run_is_not_completed_for_those_who_watch_before_its_release_is_published() -> None:
    story = Story()
    story.tell(requested(), produced(), RunCompleted(run="run-1", attempt=1))
    assert story.world.is_publishing("run-1")
    shown = views.run(story.world.run("run-1"), publishing=True, version=None, matching=0, doing=lambda _: "queued")
    assert shown.state == "publishing"
    story.tell(published())
    assert not story.world.is_publishing("run-1")
    release = story.world.release_of("run-1")
    assert release is not None
    assert release.manifest.version == 1


def test_a_paused_run_keeps_its_round_and_goes_on_as_the_next_attempt_with_all_its_time() -> None:
    story = Story()
    story.tell(requested(policy=RoundPolicy(deadline_s=60)), opened(1, "a", "b"), received(1, "a"))
    assert story.tell(RunPauseRequested(run="run-1")) == (SuspendAggregator("run-1"),)
    assert story.pending_commands() == [SuspendAggregator("run-1")]
    story.tell(AggregatorExited(run="run-1", attempt=1, code=143), received(1, "b"))
    assert isinstance(story.world.run("run-1"), runs.Paused)
    launch, alarm = story.tell(RunResumeRequested(run="run-1"), after_s=1000)
    assert (launch.attempt, alarm.due) == (2, story.events[-1].time + timedelta(seconds=60))
    assert story.world.run("run-1").rounds[1].phases["train"].received == {"a", "b"}


def test_an_app_that_keeps_its_rounds_to_itself_cannot_be_paused() -> None:
    story = Story()
    story.tell(requested(), opened(1, "a", resumable=False))
    with pytest.raises(InvalidTransition, match="cannot be paused"):
        story.tell(RunPauseRequested(run="run-1"))
    assert isinstance(story.world.run("run-1"), runs.Running)


def test_a_paused_run_can_be_cancelled() -> None:
    story = Story()
    story.tell(requested(), RunPauseRequested(run="run-1"))
    assert story.tell(RunCancelRequested(run="run-1")) == (StopAggregator("run-1"),)


def test_a_run_that_failed_may_go_on_for_a_while_with_a_key_and_tasks_of_its_own() -> None:
    story = Story()
    story.tell(joined("a"), requested(), opened(1, "a"), RunFailed(run="run-1", attempt=1, reason="x"))
    with pytest.raises(InvalidTransition, match="try again in a moment"):
        story.tell(RunResumeRequested(run="run-1"))
    story.tell(RunCleanedUp(run="run-1", key="K1"))
    commands = story.tell(RunResumeRequested(run="run-1"))
    launch = next(c for c in commands if isinstance(c, LaunchAggregator))
    assert (launch.attempt, launch.life) == (2, 2)
    assert not story.world.run("run-1").rounds, "the round under way is begun again"
    story.tell(RunFailed(run="run-1", attempt=2, reason="y"), RunCleanedUp(run="run-1", key="K2"))
    assert set(story.world.identities.ended) == {"K1", "K2"}
    assert runs.why_not_kept(story.world.run("run-1"), START + runs.RESUMABLE_FOR * 2) is not None
    assert story.replayed().runs == story.world.runs


def test_a_run_that_is_to_be_completed_tells_its_aggregator_also_after_a_crash() -> None:
    story = Story()
    story.tell(joined("a"), requested(), opened(1, "a"))
    (told,) = story.tell(RunStopRequested(run="run-1"))
    assert isinstance(told, TellTimeIsUp) and told.ends_run
    commands = story.tell(AggregatorExited(run="run-1", attempt=1, code=1))
    assert [type(c) for c in commands] == [LaunchAggregator, TellTimeIsUp]
    story.tell(RunCompleted(run="run-1", attempt=2, note="stopped"), RunCleanedUp(run="run-1"), RunRemoved(run="run-1"))
    assert not story.world.runs
    for event in (RunStopRequested(run="run-1"), RunRemoved(run="run-1")):
        with pytest.raises((InvalidTransition, NotFound)):
            story.tell(event)
