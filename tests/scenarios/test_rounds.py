"""A round's life: alarms that are set, quorums, trials, and what is counted where."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from fedtide.coordinator.commands import SetAlarm, TellTimeIsUp
from fedtide.coordinator.runs import rounds
from fedtide.fabric.events.runs import AggregatorExited
from fedtide.fabric.plans.round_policy import RoundPolicy
from tests.scenarios.build import (
    Story,
    abandoned,
    closed,
    collected,
    opened,
    received,
    refused,
    requested,
    run_alarm,
)


def _story(**policy: Any) -> Story:
    story = Story()
    story.tell(requested(policy=RoundPolicy(**policy)))
    return story


def _round(story: Story, number: int = 1) -> rounds.Round:
    return story.world.run("run-1").rounds[number]


def _alarms(story: Story) -> list[SetAlarm]:
    return [c for c in story.pending_commands() if isinstance(c, SetAlarm)]


def test_a_round_goes_through_its_states() -> None:
    story = _story()
    seen = []
    for event in (opened(1, "a", "b"), received(1, "a"), received(1, "b"), collected(1), closed(1)):
        story.tell(event)
        seen.append(type(_round(story)).__name__)
    assert seen == ["Open", "Collecting", "Collecting", "Aggregating", "Closed"]
    assert _alarms(story) == []


def test_an_open_round_owes_its_deadline_and_when_it_rings_the_word_that_time_is_up() -> None:
    story = _story(deadline_s=30)
    (alarm,) = story.tell(opened(1, "a", "b"))
    assert alarm.due == story.events[-1].time + timedelta(seconds=30)
    assert _alarms(story) == [alarm]
    word = TellTimeIsUp("run-1", 1, 1, "train", "deadline")
    assert story.tell(run_alarm(alarm.key)) == (word,)
    assert word in story.pending_commands()
    assert _alarms(story) == []
    story.tell(AggregatorExited(run="run-1", attempt=1, code=-9))
    assert word in story.pending_commands()
    story.tell(collected(1, "deadline", attempt=2))
    assert word not in story.pending_commands()


def test_an_alarm_that_is_not_waited_for_changes_nothing() -> None:
    story = _story()
    story.tell(opened(1, "a"))
    before = story.world.run("run-1")
    assert story.tell(run_alarm("7.1.train.deadline.0")) == ()
    assert story.world.run("run-1") == before


def test_with_its_quorum_a_round_waits_for_the_grace_time() -> None:
    story = _story(quorum=2, grace_s=5)
    story.tell(opened(1, "a", "b", "c", quorum=2), received(1, "a"))
    (grace,) = story.tell(received(1, "b"))
    assert grace.due == story.events[-1].time + timedelta(seconds=5)
    assert story.tell(run_alarm(grace.key)) == (TellTimeIsUp("run-1", 1, 1, "train", "grace over"),)


def test_an_abandoned_round_is_opened_again_with_other_nodes_and_answers_to_the_first_trial_do_not_count() -> None:
    story = _story()
    story.tell(opened(1, "a"), refused(1, "a"), abandoned(1))
    assert isinstance(_round(story), rounds.Abandoned)
    story.tell(opened(1, "b", trial=2), received(1, "a"), received(1, "b", trial=2), closed(1))
    state = _round(story)
    assert isinstance(state, rounds.Closed)
    assert state.before == ("too few",)
    assert state.phases["train"].received == {"b"}


def test_an_update_that_was_asked_for_earlier_is_marked_as_stale() -> None:
    story = _story(mode="async", buffer=1)
    story.tell(opened(2, "a", "b", quorum=1), received(2, "b", staleness=1), collected(2, "buffer full"))
    tally = _round(story, 2).phases["train"]
    assert (set(tally.stale), set(tally.awaited)) == ({"b"}, {"a"}) and tally.cause == "buffer full"


def test_an_evaluation_opens_the_round_again() -> None:
    story = _story(deadline_s=30)
    story.tell(opened(1, "a"), received(1, "a"), collected(1))
    (alarm,) = story.tell(opened(1, "a", phase="evaluate"))
    assert ".evaluate." in alarm.key
    assert isinstance(_round(story), rounds.Open)


def test_rounds_of_an_app_that_keeps_them_to_itself_have_no_alarms() -> None:
    story = _story()
    assert story.tell(opened(1, "a", resumable=False)) == ()
