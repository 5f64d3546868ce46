"""Why something is as it is: the reason first, then the events that led to it."""

from __future__ import annotations

import pytest

from fedtide.coordinator.log import history as causes
from fedtide.fabric.errors import NotFound
from fedtide.fabric.events.envelope import NodeOffline, SignalReceived, TriggerApplied
from fedtide.fabric.events.runs import AggregatorExited, RunCompleted, RunPauseRequested
from fedtide.fabric.plans.trigger_rule import Signal, StartRun, TriggerRule
from tests.scenarios.build import (
    APP,
    Story,
    abandoned,
    closed,
    collected,
    joined,
    opened,
    received,
    refused,
    requested,
    run_alarm,
)


def _said(story: Story, name: str, number: int | None = None) -> list[str]:
    return [step.what for step in causes.history(story.events, name, number)]


def test_a_run_names_the_rule_and_the_event_that_led_to_it() -> None:
    story = Story()
    rule = TriggerRule(name="r", on="drift", where="psi > 0.2", do=StartRun(app=APP))
    story.tell(TriggerApplied(rule=rule))
    (fire,) = story.tell(SignalReceived(signal=Signal(id="s#7", type="drift", fields={"psi": 0.3})))
    asked = requested(fire.id).model_copy(update={"by": "trigger r", "cause": fire.cause})
    story.tell(asked, AggregatorExited(run=fire.id, attempt=1, code=-9, reason="out of memory"))
    state, *rest = causes.present(story.world, fire.id, None)
    assert state == "running, attempt 2: the aggregator ended with code -9: out of memory; attempt 2"
    assert "started by trigger r, because of drift s#7" in rest
    assert "the rule fires on drift where psi > 0.2" in rest
    assert _said(story, fire.id)[0] == "requested by trigger r, because of drift s#7"


def test_a_round_says_who_is_waited_for_who_does_not_count_and_who_was_not_asked() -> None:
    story = Story()
    story.tell(joined("a"), joined("b"), joined("c"), NodeOffline(node="c", reason="stopped"), requested())
    (deadline,) = story.tell(opened(1, "a", "b"))
    story.tell(refused(1, "a", "not_finite"))
    assert causes.present(story.world, "run-1", 1) == [
        "round 1, trial 1: collecting, train: 0 of 2 answered",
        "train: waits for b",
        "train: a does not count, not_finite: because",
        "c was not asked (now: offline: stopped)",
    ]
    story.tell(run_alarm(deadline.key), abandoned(1), opened(1, "b", trial=2), received(1, "b", trial=2))
    story.tell(collected(1, trial=2), closed(1), opened(2, "b"))
    said = _said(story, "run-1", 1)
    assert said[0] == "round 1, trial 1: train asked of a, b"
    assert any(line.startswith("alarm 1.1.train.deadline") for line in said)
    assert said[-1] == "round 1 closed"
    assert causes.present(story.world, "run-1", 1)[1] == "an earlier trial was abandoned: too few"


def test_a_node_says_what_it_has_to_do_and_what_happened_to_it() -> None:
    story = Story()
    story.tell(joined("a"), requested(), opened(1, "a"))
    assert causes.present(story.world, "a", None)[1] == "has a task of run-1"
    story.tell(NodeOffline(node="a", reason="no heartbeat for 6 s"))
    assert causes.present(story.world, "a", None)[0] == "offline: no heartbeat for 6 s"
    assert _said(story, "a") == ["its agent started", "went offline: no heartbeat for 6 s"]


def test_the_end_of_a_run_is_its_first_line() -> None:
    story = Story()
    story.tell(requested(), RunPauseRequested(run="run-1"))
    assert causes.present(story.world, "run-1", None)[0] == "paused: asked by a person"
    story = Story()
    story.tell(requested(), RunCompleted(run="run-1", attempt=1, note="stopped after round 2"))
    assert causes.present(story.world, "run-1", None)[0] == "completed: stopped after round 2"


def test_what_does_not_exist_is_not_explained() -> None:
    with pytest.raises(NotFound, match="no run, roll-out, node, model or rule 'x'"):
        causes.present(Story().world, "x", None)
