"""Custom resources as requests to the API, and the API's views as their status. Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import datetime
from typing import Any

GROUP, VERSION = "fedtide.dev", "v1alpha1"
RUNS, ROLLOUTS, TRIGGERS = "federatedruns", "modelrollouts", "triggerrules"

Object = dict[str, Any]

_VERBATIM = ("runConfig", "selector", "labels")
"""Maps of the user's own keys: what stands in them is not ours to rename."""
_ENDED = ("completed", "failed", "cancelled")
OPEN_ROLLOUTS = ("rolling", "paused")
_OVER = ("Completed", "Failed", "Cancelled", "Aborted", "Rolledback", "Superseded", "Refused")


def request(spec: Mapping[str, Any]) -> Object:
    """A spec as the API's body: Kubernetes writes `runConfig` where the API writes `run_config`."""
    found: Object = _snake(spec)
    return found


def run_request(name: str, spec: Mapping[str, Any]) -> Object:
    return {**request(spec), "by": f"FederatedRun {name}"}


def rule_request(name: str, spec: Mapping[str, Any]) -> Object:
    return {**request(spec), "name": name}


def run_status(view: Mapping[str, Any], generation: int) -> Object:
    """What `kubectl get federatedruns` shows of a run."""
    state, rounds = view["state"], [r for r in view["rounds"] if r["round"] > 0]
    accuracy = next((a for r in reversed(rounds) if (a := _accuracy(r)) is not None), None)
    phase = state.capitalize()
    return {
        "run": view["run"],
        "phase": phase,
        "round": max((r["round"] for r in rounds), default=0),
        "accuracy": f"{accuracy:.4f}" if accuracy is not None else "",
        "modelVersion": view.get("version") or 0,
        "message": view["reason"],
        "observedGeneration": generation,
        "conditions": _conditions(
            Running=(state in ("starting", "running"), phase, view["reason"]),
            Complete=(state == "completed", phase, view["reason"]),
            Failed=(state in ("failed", "cancelled"), phase, view["reason"]),
        ),
    }


def run_has_ended(view: Mapping[str, Any]) -> bool:
    return view["state"] in _ENDED


def has_ended(status: Mapping[str, Any]) -> bool:
    """Whether a status will not change any more."""
    return status.get("phase") in _OVER


def rollout_status(view: Mapping[str, Any], generation: int) -> Object:
    state, regions = view["state"], view["regions"]
    phase = state.capitalize()
    nodes, confirmed = (sum(r[field] for r in regions) for field in ("nodes", "confirmed"))
    return {
        "rollout": view["rollout"],
        "phase": phase,
        "modelVersion": view["version"],
        "region": next((r["region"] for r in regions if r["state"] not in ("done", "waiting")), ""),
        "confirmed": f"{confirmed}/{nodes}",
        "message": view["reason"],
        "observedGeneration": generation,
        "conditions": _conditions(
            Progressing=(state == "rolling", phase, view["reason"]),
            Complete=(state == "completed", phase, view["reason"]),
            Failed=(state in ("aborted", "rolledback"), phase, view["reason"]),
        ),
    }


def rule_status(view: Mapping[str, Any], generation: int) -> Object:
    last = view["history"][-1] if view["history"] else {}
    return {
        "phase": "Applied",
        "fired": view["fired"],
        "active": view["active"] or "",
        "lastOutcome": last.get("outcome", ""),
        "message": last.get("reason", ""),
        "observedGeneration": generation,
        "conditions": _conditions(Ready=(True, "Applied", "")),
    }


def refused(error: str, generation: int) -> Object:
    """The status of what the coordinator does not take."""
    return {
        "phase": "Refused",
        "message": error,
        "observedGeneration": generation,
        "conditions": _conditions(Accepted=(False, "Refused", error)),
    }


def with_times(new: Object, old: Mapping[str, Any], now: datetime) -> Object:
    """Conditions keep the time of their last change, as kubectl's users expect."""
    before = {c["type"]: c for c in old.get("conditions", [])}
    conditions = []
    for condition in new["conditions"]:
        known = before.get(condition["type"], {})
        same = known.get("status") == condition["status"]
        at = known.get("lastTransitionTime") if same else None
        conditions.append({**condition, "lastTransitionTime": at or now.strftime("%Y-%m-%dT%H:%M:%SZ")})
    return {**new, "conditions": conditions}


def _conditions(**told: tuple[bool, str, str]) -> list[Object]:
    return [
        {"type": name, "status": "True" if holds else "False", "reason": reason or "Unknown", "message": message[:1024]}
        for name, (holds, reason, message) in told.items()
    ]


def _accuracy(round_: Mapping[str, Any]) -> float | None:
    metrics = round_.get("metrics") or {}
    value = next((v for n, v in metrics.items() if "acc" in n.lower()), None)
    return float(value) if isinstance(value, int | float) else None


def _snake(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {
            re.sub(r"(?<=[a-z0-9])([A-Z])", lambda m: f"_{m[1].lower()}", key): (
                dict(inner) if key in _VERBATIM else _snake(inner)
            )
            for key, inner in value.items()
        }
    if isinstance(value, list):
        return [_snake(inner) for inner in value]
    return value
