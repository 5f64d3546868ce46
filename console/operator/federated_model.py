"""A model's whole loop as one object: trigger rules of the coordinator, and what has come of them as its status. Pure.

The loop runs in the coordinator: one rule for each trigger trains, from what the nodes serve; one more rolls out the
releases that are good enough; gates and roll-back are those of its plan. It goes on while the operator is away.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import Field, JsonValue

from fedtide.console.operator import resources
from fedtide.console.operator.resources import Object, conditions
from fedtide.fabric.messages.views import (
    ROLLOUT_OPEN,
    RUN_ENDED,
    FiringView,
    ModelProgress,
    RolloutView,
    RunView,
    TriggerView,
)
from fedtide.fabric.plans.run_spec import RunRequest
from fedtide.fabric.plans.trigger_rule import TriggerRule
from fedtide.fabric.strict import Strict
from fedtide.fabric.validation import checked

ROLL_OUT = "roll-out"
"""The name of the rule that rolls out, among those of a model; no trigger has it."""
_WRONG = ("error", "failed")
"""Outcomes of a rule that nobody wants: its condition cannot be evaluated, or what it asks for is refused."""
_RELEASED = "dev.fedtide.release.published"


class Better(Strict):
    """Only a release whose metric is better than the current one's is rolled out: that under way, or that is served."""

    metric: str = Field(min_length=1, description="As the run reports it: `fedtide model ls -o yaml`")
    higher: bool = Field(default=True, description="False: lower is better, as of a loss")
    by: float = Field(default=0.0, ge=0, description="At least by so much")


class RollOut(Strict):
    """When a release is rolled out, and how."""

    when: str = Field(default="", description="Expression over the event dev.fedtide.release.published; empty: always")
    better: Better | None = None
    plan: dict[str, JsonValue] = Field(default={}, description="The fields of a roll-out plan (docs/rollouts.md)")


class ModelSpec(Strict):
    """`train`: the fields of a run. `triggers`: those of trigger rules, without `do`."""

    model: str = Field(default="", description="Registry name; empty: the resource's own")
    train: dict[str, JsonValue] = {}
    triggers: list[dict[str, JsonValue]] = []
    train_first: bool = Field(default=True, description="Train at once if there is no release, and `train` has an app")
    roll_out: RollOut | None = Field(default=None, description="None: nothing is rolled out")
    paused: bool = False


def read(name: str, spec: Mapping[str, Any]) -> ModelSpec:
    """Raises ConfigError for a field that is wrong."""
    found = checked(ModelSpec, resources.request(spec), "spec")
    return found.model_copy(update={"model": found.model or name})


def first_run(spec: ModelSpec) -> RunRequest | None:
    """The run of a model that has no release, if it may begin by itself.

    Raises:
        ConfigError: a field of `train` is wrong.
    """
    wanted = spec.train_first and not spec.paused and "app" in spec.train
    return checked(RunRequest, {**spec.train, "model": spec.model, "base": None}, "spec.train") if wanted else None


def rule_name(resource: str, trigger: str) -> str:
    """No TriggerRule can have it: names of resources have no underscore."""
    return f"{resource}_{trigger}"


def rules(resource: str, spec: ModelSpec) -> list[TriggerRule]:
    """What the coordinator is to do for a model; nothing while it is paused.

    Raises:
        ConfigError: a field is wrong; it is named as in the resource.
    """
    train = {"base": "served", **spec.train, "kind": "run", "model": spec.model}
    found = [
        checked(
            TriggerRule,
            {**trigger, "name": rule_name(resource, str(trigger.get("name") or number)), "do": train},
            f"spec.triggers[{number}]",
        )
        for number, trigger in enumerate(spec.triggers)
    ]
    if spec.roll_out is not None:
        found.append(_roll_out_rule(resource, spec.model, spec.roll_out))
    return [] if spec.paused else found


def _roll_out_rule(resource: str, model: str, wanted: RollOut) -> TriggerRule:
    rule = {
        "name": rule_name(resource, ROLL_OUT),
        "on": _RELEASED,
        "where": " and ".join(f"({each})" for each in _needed(model, wanted)),
        "policy": "replace",  # what is better than a release under way goes before it
        "do": {"kind": "rollout", "model": model, "plan": wanted.plan},
    }
    return checked(TriggerRule, rule, "spec.rollOut")


def _needed(model: str, wanted: RollOut) -> list[str]:
    found = [f"model == {model!r}"]
    if (better := wanted.better) is not None:
        new, old = f"metric_{better.metric}", f"current_metric_{better.metric}"
        first, second = (new, old) if better.higher else (old, new)
        gained = f"data[{first!r}] - data[{second!r}] {'>=' if better.by else '>'} {better.by}"
        found.append(f"has({new!r}) and (not has({old!r}) or {gained})")  # a release without the metric is worse
    if wanted.when:
        found.append(wanted.when)
    return found


def accepted(spec: ModelSpec, generation: int) -> Object:
    """The status of a resource whose spec is in force."""
    return {
        "model": spec.model,
        "paused": spec.paused,
        "inForce": generation,
        "observedGeneration": generation,
        "conditions": conditions(Accepted=(True, "Paused" if spec.paused else "InForce", "")),
    }


def refused(why: str, before: Mapping[str, Any]) -> Object:
    """The status of a resource whose spec was refused: what was in force `before` stays."""
    note = " (the spec before is still in force)" if before.get("inForce") else ""
    shown = resources.refused(f"{why}{note}", int(before.get("observedGeneration") or 0))
    return {**shown, "phase": before.get("phase", shown["phase"])} if note else shown


def status(
    paused: bool,
    progress: ModelProgress,
    run: RunView | None,
    rollout: RolloutView | None,
    rules: Sequence[TriggerView] = (),
) -> Object:
    """What `kubectl get federatedmodels` shows of a model: where it is, and why.

    Args:
        run: that of `progress`, as is `rollout`.
        rules: its own.
    """
    wrong = {r.trigger: last.reason for r in rules if (last := _last(r)) is not None and last.outcome in _WRONG}
    decided = next((last for r in rules if r.trigger.endswith(f"_{ROLL_OUT}") and (last := _last(r))), None)
    phase, message = _phase(paused, progress, run, rollout)
    serving = ", ".join(f"v{version} on {nodes} nodes" for version, nodes in progress.serving.items())
    trains = run is not None and run.state not in RUN_ENDED
    rolls = rollout is not None and rollout.state in ROLLOUT_OPEN
    is_back = rollout is not None and rollout.state == "rolledback"
    of_run = resources.run_status(run, 0) if run is not None else {}
    of_rollout = resources.rollout_status(rollout, 0) if rollout is not None else {}
    return {
        "phase": phase,
        "message": message,
        "latestVersion": progress.latest or 0,
        "servedVersion": int(next(iter(progress.serving), 0)),
        "run": progress.run,
        "round": of_run.get("round", 0),
        "accuracy": of_run.get("accuracy", ""),
        "rollout": progress.rollout,
        "region": of_rollout.get("region", ""),
        "confirmed": of_rollout.get("confirmed", ""),
        "lastDecision": f"{decided.outcome} {decided.reason}".strip() if decided is not None else "",
        "conditions": conditions(
            Deciding=(not wrong, "RulesFail" if wrong else "AsAsked", "; ".join(f"{n}: {w}" for n, w in wrong.items())),
            Training=(trains, run.state.capitalize() if run is not None else "NoRun", run.reason if run else ""),
            Trained=(progress.latest is not None, "Released" if progress.latest else "NoRelease", ""),
            RollingOut=(
                rolls,
                rollout.state.capitalize() if rollout is not None else "NoRollOut",
                rollout.reason if rollout is not None else "",
            ),
            Serving=(bool(serving) and not rolls, "Confirmed" if serving else "NoNode", serving),
            RolledBack=(is_back, "GateFailed" if is_back else "No", rollout.reason if rollout and is_back else ""),
        ),
    }


def _last(rule: TriggerView) -> FiringView | None:
    return rule.history[-1] if rule.history else None


def _phase(paused: bool, progress: ModelProgress, run: RunView | None, rollout: RolloutView | None) -> tuple[str, str]:
    """The most telling of all that is so, and its reason."""
    is_newer = run is not None and (rollout is None or rollout.started_at < run.requested_at)
    if run is not None and run.state not in RUN_ENDED:
        return "Training", run.reason or f"{run.run} is {run.state}"
    if rollout is not None and rollout.state in ROLLOUT_OPEN:
        phase = "RollingOut" if rollout.state == "rolling" else "RollOutPaused"
        return phase, rollout.reason or f"{rollout.rollout} brings v{rollout.version}"
    if paused:
        return "Paused", "no trigger fires until spec.paused is false"
    if run is not None and is_newer and run.state == "failed":
        return "TrainingFailed", f"{run.run}: {run.reason}"
    if rollout is not None and rollout.state == "rolledback" and not is_newer:
        return "RolledBack", f"{rollout.rollout} of v{rollout.version}: {rollout.reason}"
    if progress.serving:
        return "Serving", ""
    if progress.latest is not None:
        return "Trained", f"v{progress.latest} is not rolled out"
    return "Waiting", "for a trigger"
