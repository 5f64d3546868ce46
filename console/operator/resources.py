"""Custom resources as requests to the API, and the API's views as their status. Pure."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from datetime import datetime
from typing import Any

from fedtide.fabric.messages.views import RolloutView, RoundView, RunView, TriggerView, WaveState
from fedtide.fabric.plans.rollout_request import RolloutRequest
from fedtide.fabric.plans.run_spec import RunRequest
from fedtide.fabric.plans.trigger_rule import TriggerRule
from fedtide.fabric.validation import checked

GROUP, VERSION = "fedtide.dev", "v1alpha1"
RUNS, ROLLOUTS, TRIGGERS, MODELS = "federatedruns", "modelrollouts", "triggerrules", "federatedmodels"
KINDS = (RUNS, ROLLOUTS, TRIGGERS, MODELS)
NEEDED = (RUNS, ROLLOUTS, TRIGGERS)
"""Helm makes no new kinds on an upgrade: what came later is served once somebody has applied it."""

Object = dict[str, Any]

_VERBATIM = ("runConfig", "selector", "labels")
"""Maps whose keys are the user's own: they are not renamed."""
_KEPT_KEYS = ("wheels",)
"""Maps whose keys are names, and whose values are objects."""
_OVER = ("Completed", "Failed", "Cancelled", "Rolledback", "Superseded", "Refused")


def request(spec: Mapping[str, Any]) -> Object:
    """A spec as the API's body: Kubernetes writes `runConfig` where the API writes `run_config`."""
    found: Object = _snake(spec)
    return found


def run_request(spec: Mapping[str, Any]) -> RunRequest:
    """Raises ConfigError for a field that is wrong."""
    return checked(RunRequest, request(spec), "spec")


def rollout_request(spec: Mapping[str, Any]) -> RolloutRequest:
    """Raises ConfigError for a field that is wrong."""
    return checked(RolloutRequest, request({k: v for k, v in spec.items() if k != "paused"}), "spec")


def rule_request(name: str, spec: Mapping[str, Any]) -> TriggerRule:
    """Raises ConfigError for a field that is wrong."""
    return checked(TriggerRule, {**request(spec), "name": name}, "spec")


def run_status(view: RunView, generation: int) -> Object:
    """What `kubectl get federatedruns` shows of a run."""
    rounds = [r for r in view.rounds if r.round > 0]
    accuracy = next((a for r in reversed(rounds) if (a := _accuracy(r)) is not None), None)
    phase = view.state.capitalize()
    return {
        "run": view.run,
        "phase": phase,
        "round": max((r.round for r in rounds), default=0),
        "accuracy": f"{accuracy:.4f}" if accuracy is not None else "",
        "modelVersion": view.version or 0,
        "message": view.reason,
        "observedGeneration": generation,
        "conditions": conditions(
            Running=(view.state in ("starting", "running"), phase, view.reason),
            Complete=(view.state == "completed", phase, view.reason),
            Failed=(view.state in ("failed", "cancelled"), phase, view.reason),
        ),
    }


HELD = "Paused"


def held(generation: int) -> Object:
    """The status of a roll-out that is to begin when `paused` is taken back."""
    message = "paused from the beginning: it is planned and begun when spec.paused is false"
    return {
        "phase": HELD,
        "message": message,
        "observedGeneration": generation,
        "conditions": conditions(Progressing=(False, HELD, message)),
    }


def plan_digest(spec: Mapping[str, Any]) -> str:
    """Names what of a roll-out's spec cannot be changed once it was begun."""
    plan = {name: value for name, value in spec.items() if name != "paused"}
    return hashlib.sha256(json.dumps(plan, sort_keys=True).encode()).hexdigest()[:16]


def taken_over(status: Mapping[str, Any], generation: int, *, is_so: bool) -> Object:
    """What a status says of a changed spec: that it is as planned, or that the change is not taken over."""
    ignored = "a roll-out that was begun keeps its plan: create another one for this spec"
    condition = conditions(Accepted=(True, "AsPlanned", "") if is_so else (False, "ChangeIgnored", ignored))
    seen = generation if is_so else int(status.get("observedGeneration") or 0)
    return {"observedGeneration": seen, "conditions": condition}


def has_ended(status: Mapping[str, Any]) -> bool:
    """Whether a status will not change any more."""
    return status.get("phase") in _OVER


def is_under_way(status: Mapping[str, Any], **_: Any) -> bool:
    """Only then is there something to end before the resource goes: others have no finalizer."""
    return not has_ended(status)


def rollout_status(view: RolloutView, generation: int) -> Object:
    """What `kubectl get modelrollouts` shows of a roll-out; `region` is the one that is under way, or was last."""
    phase = view.state.capitalize()
    under_way = [w.region for w in view.regions if w.state in _UNDER_WAY]
    begun = [w.region for w in view.regions if w.state != "waiting"]
    nodes, confirmed = sum(w.nodes for w in view.regions), sum(w.confirmed for w in view.regions)
    return {
        "rollout": view.rollout,
        "phase": phase,
        "modelVersion": view.version,
        "region": (under_way or begun[-1:] or [""])[0],
        "confirmed": f"{confirmed}/{nodes}",
        "message": view.reason,
        "observedGeneration": generation,
        "conditions": conditions(
            Progressing=(view.state == "rolling", phase, view.reason),
            Complete=(view.state == "completed", phase, view.reason),
            Failed=(view.state == "rolledback", phase, view.reason),
        ),
    }


_UNDER_WAY: tuple[WaveState, ...] = ("caching", "offering", "baking")


def rule_status(view: TriggerView, generation: int) -> Object:
    last = view.history[-1] if view.history else None
    return {
        "phase": "Applied",
        "fired": view.fired,
        "active": view.active or "",
        "lastOutcome": last.outcome if last is not None else "",
        "message": last.reason if last is not None else "",
        "observedGeneration": generation,
        "conditions": conditions(Ready=(True, "Applied", "")),
    }


def refused(error: str, generation: int) -> Object:
    """The status of a resource that the coordinator refused."""
    return {
        "phase": "Refused",
        "message": error,
        "observedGeneration": generation,
        "conditions": conditions(Accepted=(False, "Refused", error)),
    }


def rule_in_force(view: TriggerView, status: Mapping[str, Any], generation: int) -> Object:
    """The status of a rule that fires; if a later spec was refused, it goes on saying so."""
    shown = rule_status(view, generation)
    if status.get("phase") != "Refused":
        return shown
    kept = ("phase", "message", "observedGeneration")
    return {**shown, **{name: status[name] for name in kept if name in status}}


def with_times(new: Object, old: Mapping[str, Any], now: datetime) -> Object:
    """Conditions keep the time of their last change, as kubectl's users expect; those not in `new` stay as they are."""
    before = {c["type"]: c for c in old.get("conditions", [])}
    silent = before.keys() - {c["type"] for c in new["conditions"]}
    conditions = [before[kind] for kind in sorted(silent)]
    for condition in new["conditions"]:
        known = before.get(condition["type"], {})
        same = known.get("status") == condition["status"]
        at = known.get("lastTransitionTime") if same else None
        conditions.append({**condition, "lastTransitionTime": at or now.strftime("%Y-%m-%dT%H:%M:%SZ")})
    return {**new, "conditions": conditions}


def conditions(**holds: tuple[bool, str, str]) -> list[Object]:
    """By type: whether it holds, a reason in one word, and a message. Their times come by `with_times`."""
    return [
        {"type": name, "status": "True" if is_so else "False", "reason": reason or "Unknown", "message": message[:1024]}
        for name, (is_so, reason, message) in holds.items()
    ]


def _accuracy(round_: RoundView) -> float | None:
    return next((v for n, v in round_.metrics.items() if "acc" in n.lower()), None)


def _inner(key: str, value: Any) -> Any:
    if key in _VERBATIM:
        return dict(value)
    return {name: _snake(each) for name, each in value.items()} if key in _KEPT_KEYS else _snake(value)


def _snake(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {
            re.sub(r"(?<=[a-z0-9])([A-Z])", lambda m: f"_{m[1].lower()}", key): _inner(key, inner)
            for key, inner in value.items()
        }
    if isinstance(value, list):
        return [_snake(inner) for inner in value]
    return value
