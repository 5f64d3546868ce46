"""Gates over what a Prometheus answers: what decides, and what is never a pass."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from fedtide.coordinator.adapters.gate_queries import is_news, open_questions, value_of
from fedtide.coordinator.rollouts import rollouts
from fedtide.coordinator.rollouts.gates import UNASKED, after_answer
from fedtide.fabric.events.rollouts import QueryAnswered, RolloutResumeRequested
from fedtide.fabric.plans.rollout_plan import Bake, QueryGate
from tests.scenarios.build import Story, rollout, wave
from tests.scenarios.rollout_story import confirm, offers, started, state_of, view_of

GATE = {"kind": "query", "query": "max(shop_errors)", "most": 0.05}


def baking(**gate: Any) -> Story:
    """The canary of the first region has confirmed, and its stage bakes."""
    story = started(wave("eu", "e1", "e2"), gates=[{**GATE, **gate}], bake=Bake(seconds=0))
    confirm(story, "e1")
    return story


def answered(story: Story, value: float | None, reason: str = "", **other: Any) -> QueryAnswered:
    """To what is asked now."""
    (question,) = open_questions(story.world)
    return QueryAnswered(**{**question._asdict(), "value": value, "reason": reason, **other})


def test_a_question_is_open_while_a_stage_bakes_and_its_answer_lets_the_next_begin() -> None:
    story = Story()
    story.tell(rollout(wave("eu", "e1", "e2"), gates=[GATE]))
    assert not list(open_questions(story.world))
    assert offers(confirm(story, "e1")) == []
    (question,) = open_questions(story.world)
    assert (question.rollout, question.region, question.stage, question.gate) == ("ro-1", "eu", "canary", 0)
    before = answered(story, 0.05)
    assert offers(story.tell(before)) == ["e2"]
    assert not list(open_questions(story.world))
    confirm(story, "e2")
    story.tell(before)  # of the stage before
    story.tell(answered(story, 0.05, stage="canary"))
    assert not isinstance(state_of(story), rollouts.Completed)
    story.tell(answered(story, 0.01))
    assert isinstance(state_of(story), rollouts.Completed)


def test_a_value_out_of_bounds_takes_the_release_back_and_is_in_the_reason() -> None:
    story = baking()
    story.tell(answered(story, 0.06))
    assert isinstance(state_of(story), rollouts.RolledBack)
    assert state_of(story).reason == "eu, canary: query: 0.06, allowed at most 0.05, 1 of 1 in a row"


def test_as_many_in_a_row_as_the_plan_says_decide() -> None:
    story = baking(times=3, least=0)
    for value in (0.06, 0.06, 0.01, 0.01, -1, 0.01, 0.01):
        story.tell(answered(story, value))
        assert isinstance(state_of(story), rollouts.Rolling), value
    assert view_of(story).regions[0].gates[0].reason == (
        "query: 0.01, allowed at least 0 and at most 0.05, 2 of 3 in a row"
    )
    assert offers(story.tell(answered(story, 0.01))) == ["e2"]


def test_no_value_is_never_a_pass_and_after_three_a_person_is_asked() -> None:
    story = baking()
    for _ in range(2):
        story.tell(answered(story, None, "the answer is nan"))
        assert isinstance(state_of(story), rollouts.Rolling)
    story.tell(answered(story, None, "the answer is nan"))
    assert "cannot be judged, query: no value (3 of 3 in a row): the answer is nan" in state_of(story).reason
    assert list(open_questions(story.world))  # what holds when it goes on decides
    of_the_bake_before = answered(story, 0.0)
    story.tell(RolloutResumeRequested(rollout="ro-1"))
    assert offers(story.tell(of_the_bake_before)) == []
    assert isinstance(state_of(story), rollouts.Rolling)
    assert offers(story.tell(answered(story, 0.0))) == ["e2"]


def test_a_gate_that_nobody_has_asked_yet_is_no_reason_to_pause() -> None:
    story = started(wave("eu", "e1", "e2"), gates=[GATE], on_inconclusive="pause")
    confirm(story, "e1")
    assert isinstance(state_of(story), rollouts.Rolling)


def test_an_answer_of_long_ago_is_no_pass() -> None:
    story = started(wave("eu", "e1", "e2"), gates=[GATE], bake=Bake(seconds=1800))
    confirm(story, "e1")
    story.tell(answered(story, 0.01))
    assert offers(story.ring()) == []
    assert getattr(state_of(story), "reason", "") == ""
    assert offers(story.tell(answered(story, 0.01))) == ["e2"]


def test_what_decides_nothing_more_is_no_news() -> None:
    gate = QueryGate(query="up", least=1, times=4)
    known = UNASKED
    for value, news in ((1.0, True), (1.0, True), (1.0, True), (1.0, True), (1.0, False), (0.0, True), (None, True)):
        assert is_news(gate, known, value) is news, value
        known = after_answer(gate, known, value, "", None)


@pytest.mark.parametrize("bound", ["most", "least"])
def test_a_bound_is_a_number(bound: str) -> None:
    with pytest.raises(ValidationError):
        QueryGate.model_validate({"query": "up", bound: float("nan")})


def test_one_that_is_not_enforced_only_shows() -> None:
    story = started(wave("eu", "e1", "e2"), gates=[{**GATE, "enforce": False}])
    assert offers(confirm(story, "e1")) == ["e2"]


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        ({}, "Prometheus says"),
        ({"status": "error", "error": "parse error"}, "parse error"),
        ({"status": "success"}, "cannot be read"),
        ({"status": "success", "data": {"resultType": "vector", "result": []}}, "empty"),
        ({"status": "success", "data": {"resultType": "vector", "result": [{}, {}]}}, "2 series"),
        ({"status": "success", "data": {"resultType": "vector", "result": [{"value": [1, "x"]}]}}, "cannot be read"),
        ({"status": "success", "data": {"resultType": "vector", "result": [{"value": [1, "NaN"]}]}}, "nan"),
        ({"status": "success", "data": {"resultType": "scalar", "result": [1, "+Inf"]}}, "inf"),
        ({"status": "success", "data": {"resultType": "matrix", "result": []}}, "matrix"),
        ({"status": "success", "data": 7}, "cannot be read"),
        ({"status": "success", "data": {"resultType": "scalar", "result": [1, 10**400]}}, "cannot be read"),
    ],
)
def test_an_answer_without_one_value_says_why(answer: dict[str, Any], says: str) -> None:
    value, reason = value_of(answer)
    assert value is None and says in reason


def test_a_scalar_is_a_value() -> None:
    assert value_of({"status": "success", "data": {"resultType": "scalar", "result": [1, "0.5"]}}) == (0.5, "")


@pytest.mark.parametrize(
    ("gate", "says"),
    [
        ({"query": "up"}, "most"),
        ({"query": "up{a='$user'}", "most": 1}, r"\$user is none of"),
        ({"query": "up", "most": 1, "every_s": 0}, "every_s"),
    ],
)
def test_a_gate_that_cannot_work_is_refused(gate: dict[str, Any], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        QueryGate.model_validate(gate)


def test_names_of_label_replace_stay() -> None:
    assert QueryGate(query='label_replace(up, "a", "$1", "b", "(.*)")', most=1)
