"""One object for a model's loop: which rules it stands for, and what its status says."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from fedtide.console.operator import federated_model
from fedtide.console.operator.federated_model import ModelSpec
from fedtide.console.operator.resources import Object
from fedtide.coordinator import conditions
from fedtide.fabric.errors import ConfigError
from fedtide.fabric.messages.views import (
    FiringView,
    ModelProgress,
    RolloutState,
    RolloutView,
    RunState,
    RunView,
    TriggerView,
)
from fedtide.fabric.plans.trigger_rule import FieldValue, StartRollout, StartRun, TriggerRule

NOW = datetime(2026, 5, 4, tzinfo=UTC)


def _rules(**spec: object) -> dict[str, TriggerRule]:
    read = federated_model.read("digits", spec)
    return {rule.name: rule for rule in federated_model.rules("digits", read)}


def _rolls_out(spec: Object, **fields: FieldValue) -> bool:
    where = _rules(rollOut=spec)["digits_roll-out"].where
    return conditions.holds(where, {"model": "digits", "current_version": 0, **fields})


def test_each_trigger_trains_from_what_the_nodes_serve_and_one_rule_rolls_out() -> None:
    found = _rules(
        train={"rounds": 3, "runConfig": {"learningRate": 0.1}},
        triggers=[
            {"name": "drift", "on": "drift", "cooldownS": 60},
            {"name": "nightly", "schedule": {"cron": "0 2 * * *"}},
        ],
        rollOut={"plan": {"canary": 0.1, "maxError": 0.2}},
    )
    assert list(found) == ["digits_drift", "digits_nightly", "digits_roll-out"]
    train, ship = found["digits_drift"].do, found["digits_roll-out"].do
    assert isinstance(train, StartRun) and isinstance(ship, StartRollout)
    assert (train.base, train.model, train.rounds, train.run_config) == ("served", "digits", 3, {"learningRate": 0.1})
    assert found["digits_drift"].cooldown_s == 60
    assert ship.plan == {"canary": 0.1, "max_error": 0.2}


def test_a_paused_model_has_no_rules_and_a_wrong_field_is_named_as_it_stands_in_the_resource() -> None:
    assert not _rules(paused=True, triggers=[{"name": "x", "on": "x"}])
    with pytest.raises(ConfigError, match=r"spec\.triggers\[1\]"):
        _rules(triggers=[{"name": "x", "on": "x"}, {"name": "y", "on": "y", "schedule": {"cron": "* * * * *"}}])
    with pytest.raises(ConfigError, match=r"spec"):
        _rules(rollout={})


@pytest.mark.parametrize(
    ("better", "new", "old", "wanted"),
    [
        ({"metric": "accuracy"}, 0.9, 0.8, True),
        ({"metric": "accuracy"}, 0.8, 0.8, False),
        ({"metric": "accuracy", "by": 0.2}, 0.9, 0.8, False),
        ({"metric": "loss/eval", "higher": False}, 0.3, 0.4, True),
        ({"metric": "loss/eval", "higher": False}, 0.4, 0.3, False),
    ],
)
def test_only_a_better_release_is_rolled_out(better: Object, new: float, old: float, wanted: bool) -> None:
    fields = {f"metric_{better['metric']}": new, f"current_metric_{better['metric']}": old, "current_version": 3}
    assert _rolls_out({"better": better}, **fields) is wanted


def test_the_first_release_is_rolled_out_and_conditions_of_the_owner_hold_too() -> None:
    assert _rolls_out({"better": {"metric": "accuracy"}}, metric_accuracy=0.1)
    assert not _rolls_out({"when": "metric_accuracy > 0.5"}, metric_accuracy=0.1)
    assert not _rolls_out({"when": "1 > 2 or 2 > 1"}, model="another")
    assert _rolls_out({"better": {"metric": "f1"}}, metric_f1=0.1, current_version=3), "the current one has no f1"
    assert not _rolls_out({"better": {"metric": "f1"}}, metric_loss=0.1), "it has none itself"


def test_a_model_trains_at_once_only_with_an_app_of_its_own() -> None:
    app = {"name": "a", "bundle": {"digest": "0" * 64, "sizeBytes": 1}}
    asked = federated_model.first_run(federated_model.read("digits", {"train": {"app": app}}))
    assert asked is not None and asked.base is None and asked.model == "digits"
    for spec in ({}, {"train": {"app": app}, "trainFirst": False}, {"train": {"app": app}, "paused": True}):
        assert federated_model.first_run(federated_model.read("digits", spec)) is None


def _run(state: RunState, at: datetime) -> RunView:
    return RunView.model_construct(
        run="run-1", state=state, reason="why", requested_at=at, rounds=[], version=None, model="digits"
    )


def _rollout(state: RolloutState, at: datetime) -> RolloutView:
    return RolloutView.model_construct(
        rollout="ro-1", state=state, reason="accuracy -0.1", started_at=at, regions=[], version=2, model="digits"
    )


@pytest.mark.parametrize(
    ("paused", "progress", "run", "rollout", "phase"),
    [
        (False, {"latest": None, "serving": {}}, None, None, "Waiting"),
        (False, {"latest": 1, "serving": {}}, ("completed", 0), None, "Trained"),
        (False, {"latest": 1, "serving": {"1": 3}}, ("running", 5), ("completed", 1), "Training"),
        (False, {"latest": 2, "serving": {"1": 3}}, ("completed", 0), ("rolling", 1), "RollingOut"),
        (False, {"latest": 2, "serving": {"1": 3}}, ("completed", 0), ("paused", 1), "RollOutPaused"),
        (False, {"latest": 2, "serving": {"1": 3}}, ("completed", 0), ("rolledback", 1), "RolledBack"),
        (False, {"latest": 2, "serving": {"1": 3}}, ("failed", 5), ("rolledback", 1), "TrainingFailed"),
        (False, {"latest": 2, "serving": {"2": 3}}, ("completed", 0), ("completed", 1), "Serving"),
        (True, {"latest": 2, "serving": {"2": 3}}, ("completed", 0), ("completed", 1), "Paused"),
    ],
)
def test_its_phase_is_the_most_telling_of_all_that_is_so(
    paused: bool,
    progress: Object,
    run: tuple[RunState, int] | None,
    rollout: tuple[RolloutState, int] | None,
    phase: str,
) -> None:
    of_run = _run(run[0], NOW + timedelta(hours=run[1])) if run is not None else None
    of_rollout = _rollout(rollout[0], NOW + timedelta(hours=rollout[1])) if rollout is not None else None
    shown = federated_model.status(paused, ModelProgress(model="digits", **progress), of_run, of_rollout)
    assert shown["phase"] == phase
    holds = {c["type"]: c["status"] == "True" for c in shown["conditions"]}
    assert holds["Serving"] == (bool(progress["serving"]) and phase not in ("RollingOut", "RollOutPaused"))
    assert holds["RolledBack"] == (rollout is not None and rollout[0] == "rolledback")


def test_a_rule_that_cannot_decide_is_named() -> None:
    line = FiringView(at=NOW, signal="s", type="t", outcome="error", reason="f1 is not defined")
    rule = TriggerView.model_construct(trigger="digits_roll-out", history=[line])
    shown = federated_model.status(False, ModelProgress(model="digits", latest=1, serving={}), None, None, [rule])
    (deciding,) = [c for c in shown["conditions"] if c["type"] == "Deciding"]
    assert (deciding["status"], deciding["message"]) == ("False", "digits_roll-out: f1 is not defined")
    assert shown["lastDecision"] == "error f1 is not defined"


def test_a_refused_change_leaves_what_was_in_force() -> None:
    before = {**federated_model.accepted(ModelSpec(model="digits"), 3), "phase": "Serving"}
    refused = federated_model.refused("spec.triggers[0]: wrong", before)
    assert (refused["phase"], refused["observedGeneration"]) == ("Serving", 3)
    assert federated_model.refused("wrong", {})["phase"] == "Refused"
