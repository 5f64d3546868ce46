"""Quorums, discounts and stop rules, by hand."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from fedtide.fabric.plans.round_policy import (
    RoundPolicy,
    Selection,
    StopRule,
    best_round,
    quorum_of,
    resolved,
    staleness_weight,
    why_stop,
)


@pytest.mark.parametrize(
    ("policy", "selection", "asked", "quorum"),
    [
        ({}, {}, 10, 10),
        ({"quorum": 7}, {}, 10, 7),
        ({}, {"nodes": 10, "over_provision": 1.3}, 13, 10),
        ({}, {"fraction": 0.5, "over_provision": 1.3}, 13, 10),
        ({"mode": "async", "buffer": 3}, {}, 10, 3),
        ({"mode": "semi_sync"}, {}, 10, 10),
    ],
)
def test_the_quorum_follows_from_policy_and_selection(
    policy: dict[str, Any], selection: dict[str, Any], asked: int, quorum: int
) -> None:
    assert quorum_of(RoundPolicy(**policy), Selection(**selection), asked) == quorum


def test_a_stale_update_weighs_less_by_fedbuffs_polynomial() -> None:
    policy = RoundPolicy(mode="async", buffer=1)
    assert [staleness_weight(policy, age) for age in (0, 3, 8)] == pytest.approx([1.0, 0.5, 1 / 3])


@pytest.mark.parametrize(
    ("rule", "values", "moved", "words"),
    [
        ({"metric": "acc", "target": 0.9}, [0.5, 0.95], 0, "target is 0.9"),
        ({"metric": "acc", "target": 0.9}, [0.5, 0.89], 0, None),
        ({"metric": "loss", "mode": "min", "target": 0.1}, [0.5, 0.09], 0, "loss is 0.09"),
        ({"metric": "acc", "patience": 2}, [0.5, 0.6, 0.6, 0.59], 0, "not improved on 0.6 of round 2"),
        ({"metric": "acc", "patience": 2}, [0.5, 0.6, 0.6, 0.61], 0, None),
        ({"metric": "acc", "patience": 2, "min_delta": 0.05}, [0.5, 0.51, 0.52], 0, "of round 1 for 2 rounds"),
        ({"metric": "f1", "target": 0.9}, [0.5], 0, None),
        ({"max_bytes": 100}, [0.5], 99, None),
        ({"max_bytes": 100}, [0.5], 100, "budget is 100"),
    ],
)
def test_a_stop_rule_says_why_or_nothing(
    rule: dict[str, Any], values: list[float], moved: int, words: str | None
) -> None:
    name = rule.get("metric", "acc")
    history = [(n, {"acc" if name == "f1" else name: v}) for n, v in enumerate(values, start=1)]
    reason = why_stop(StopRule(**rule), history, moved)
    assert reason is None if words is None else words in (reason or "")


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        (RoundPolicy, {"mode": "async"}),
        (RoundPolicy, {"buffer": 3}),
        (RoundPolicy, {"mode": "async", "buffer": 3, "quorum": 3}),
        (Selection, {"nodes": 3, "fraction": 0.5}),
        (StopRule, {"metric": "acc"}),
        (StopRule, {"target": 0.5}),
    ],
)
def test_what_makes_no_sense_together_is_refused(kind: type[Any], fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        kind(**fields)


def _series(*losses: float) -> list[tuple[int, dict[str, float]]]:
    return [(number, {"loss": loss}) for number, loss in enumerate(losses)]


def test_nan_is_no_improvement_and_no_reason_to_stop() -> None:
    rule = StopRule(metric="loss", mode="min", patience=2)
    nan = float("nan")
    assert why_stop(rule, _series(nan, 5, 4, 3), 0) is None
    assert why_stop(rule, _series(nan, nan), 0) is None
    assert "not improved on 4 of round 1" in str(why_stop(rule, _series(5, 4, nan, nan), 0))
    assert best_round(rule, _series(nan, 5, 1, 1, 9)) == 2, "the first of equal ones"
    assert best_round(rule, _series(nan, nan)) is None


def test_rounds_without_the_metric_do_not_use_up_patience() -> None:
    rule = StopRule(metric="loss", mode="min", patience=3)
    evaluated = [(0, {}), (1, {}), (2, {"loss": 2.0}), (3, {}), (4, {}), (5, {})]
    assert why_stop(rule, evaluated, 0) is None


def test_a_metric_may_be_called_as_the_client_app_calls_it() -> None:
    series = [(1, {"eval_acc": 0.5, "train_loss": 1.0, "eval_loss": 1.0})]
    assert resolved(StopRule(metric="acc", target=0.3), series).metric == "eval_acc"
    for ambiguous in ("loss", "nothing"):
        assert resolved(StopRule(metric=ambiguous, target=0.3), series).metric == ambiguous
