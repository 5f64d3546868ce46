"""What people and programs see: aggregates as JSON-ready dictionaries. Pure."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

from fedtide.coordinator.fleet import fleet
from fedtide.coordinator.models import registry
from fedtide.coordinator.runs import rounds, runs

View = dict[str, Any]


def node(state: fleet.Node, telemetry: Mapping[str, Any]) -> View:
    capabilities = state.capabilities
    return {
        "name": state.name,
        "region": state.region,
        "state": "online" if state.online else "offline",
        "reason": state.reason,
        "since": state.since.isoformat(timespec="seconds"),
        "labels": capabilities.labels,
        "cpus": capabilities.cpus,
        "memory_bytes": capabilities.memory_bytes,
        "disk_free_bytes": capabilities.disk_free_bytes,
        "extras": capabilities.extras,
        "samples": capabilities.samples,
        "node_config": capabilities.node_config,
        "inference_url": capabilities.inference_url,
        "agent_version": capabilities.agent_version,
        "rss_bytes": telemetry.get("rss_bytes"),
        "trainer_rss_bytes": telemetry.get("trainer_rss_bytes"),
        "busy": telemetry.get("busy"),
        "serving": telemetry.get("serving", {}),
        "inferences": telemetry.get("inferences"),
    }


Doing = Callable[[str], str]
"""What a node is doing for a run: queued, downloading, training, offline."""


def doing(run: str, node: fleet.Node | None, telemetry: Mapping[str, Any]) -> str:
    """What an awaited node is doing, by its last word."""
    if node is None or not node.online:
        return "offline"
    busy = str(telemetry.get("busy") or "")
    return str(telemetry.get("stage")) if busy.startswith(f"{run}-") else "queued"


def run(state: runs.Run, *, publishing: bool, version: int | None, matching: int, doing: Doing) -> View:
    """A run with its rounds.

    Args:
        publishing: what it produced is not a release yet: it is not completed for those who watch.
        version: of the release it brought.
        matching: nodes that are online and that its selector matches.
        doing: what an awaited node is doing for this run.
    """
    facts = state.facts
    view: View = {
        "run": facts.run,
        "app": facts.spec.app.name,
        "model": facts.spec.model,
        "state": "publishing" if publishing and isinstance(state, runs.Ended) else _run_state(state),
        "reason": state.reason or _waiting(state, matching),
        "version": version,
        "by": facts.by,
        "attempt": state.attempt,
        "requested_at": facts.requested_at.isoformat(timespec="seconds"),
        "selector": facts.spec.selector,
        "participants": sorted(runs.participants(state)),
        "rounds": [_round(r, doing) for _, r in sorted(state.rounds.items())],
    }
    if isinstance(state, runs.Ended):
        view["seconds"] = round((state.ended_at - facts.requested_at).total_seconds(), 3)
    return view


def _waiting(state: runs.Run, matching: int) -> str:
    if not isinstance(state, runs.Running) or not state.started or any(state.rounds):
        return ""
    return f"no round yet; {matching} matching nodes are online (the app may wait for more)"


def _run_state(state: runs.Run) -> str:
    if isinstance(state, runs.Ended):
        return state.outcome
    if isinstance(state, runs.Paused):
        return "paused"
    return "running" if state.started else "starting"


def _round(state: rounds.Round, doing: Doing) -> View:
    is_open = isinstance(state, rounds.Open | rounds.Collecting)
    view: View = {
        "round": state.number,
        "trial": state.trial,
        "state": type(state).__name__.lower(),
        "reason": _round_reason(state),
        "abandoned": list(state.before),
        "phases": {name: _tally(t, doing if is_open else None) for name, t in state.phases.items()},
        "metrics": finite(dict(state.metrics)) if isinstance(state, rounds.Closed) else {},
        "seconds": round(state.seconds, 3) if isinstance(state, rounds.Closed) else None,
        "bytes_up": sum(t.bytes_up for t in state.phases.values()),
        "bytes_down": sum(t.bytes_down for t in state.phases.values()),
    }
    return view


def _round_reason(state: rounds.Round) -> str:
    match state:
        case rounds.Abandoned(reason=reason):
            return reason
        case rounds.Closed(phases=phases):
            cause = phases["train"].cause if "train" in phases else None
            return f"closed: {cause}" if cause is not None else ""
        case rounds.Aggregating(phase=phase):
            return f"{phase}: {state.phases[phase].cause}, being aggregated"
        case rounds.Open(phase=phase) | rounds.Collecting(phase=phase):
            tally = state.phases.get(phase, rounds.Tally())
            wanted = f", {tally.quorum} suffice" if tally.quorum not in (None, len(tally.asked)) else ""
            return f"{phase}: {len(tally.received)} of {len(tally.asked)} answered{wanted}"


def finite(value: Any) -> Any:
    """The same with None for NaN and infinity, which JSON does not have."""
    match value:
        case float() if not math.isfinite(value):
            return None
        case dict():
            return {k: finite(v) for k, v in value.items()}
        case list():
            return [finite(v) for v in value]
        case _:
            return value


def _tally(tally: rounds.Tally, doing: Doing | None) -> View:
    states = Counter(answered=len(tally.received), refused=len(tally.refused))
    states.update(doing(n) if doing is not None else "awaited" for n in tally.awaited)
    return {
        "asked": len(tally.asked),
        "states": {name: count for name, count in states.items() if count},
        "received": sorted(tally.received),
        "awaited": sorted(tally.awaited),
        "stale": sorted(tally.stale),
        "quorum": tally.quorum,
        "cause": tally.cause,
        "refused": {n: {"category": r.category, "reason": r.reason} for n, r in sorted(tally.refused.items())},
    }


def model(state: registry.Model) -> View:
    return {
        "model": state.name,
        "releases": [release(r) for r in state.releases],
        "latest": state.latest.manifest.version if state.latest else None,
    }


def release(state: registry.Release) -> View:
    manifest = state.manifest
    return {
        "version": manifest.version,
        "digest": state.ref.digest,
        "size_bytes": manifest.onnx.size_bytes,
        "metrics": manifest.metrics,
        "labels": manifest.export.labels,
        "lineage": manifest.lineage.model_dump(mode="json"),
    }
