"""Makes a roll-out plan from a request and a fleet: waves in groups, canaries chosen by a stable hash. Pure."""

from __future__ import annotations

import hashlib
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence

from fedtide.coordinator import conditions
from fedtide.coordinator.fleet.fleet import Node, matches
from fedtide.coordinator.models.registry import Model, Release
from fedtide.coordinator.rollouts import gates
from fedtide.fabric.errors import ConfigError, NotFound
from fedtide.fabric.messages.protocol import common
from fedtide.fabric.plans.rollout_plan import (
    DisagreementGate,
    LatencyGate,
    MetricGate,
    PairedGate,
    RolloutPlan,
    Terms,
    WavePlan,
)
from fedtide.fabric.plans.rollout_request import RolloutRequest
from fedtide.fabric.tensors.blobs import BlobRef

HOLDOUT = 500
"""Samples that nodes score if the plan has a paired gate and does not say how many."""
SHADOW = 0.1
"""Share of requests that the incumbent answers too, if a gate needs it and the plan does not say."""


def check_expressions(request: RolloutRequest) -> None:
    """Raises ConfigError for a metric gate whose expression no node's report could answer."""
    for number, gate in enumerate(request.gates):
        if isinstance(gate, MetricGate):
            _check_expression(f"gates.{number}.pass_if", gate.pass_if)
            _check_expression(f"gates.{number}.fail_if", gate.fail_if)


def _check_expression(path: str, expression: str) -> None:
    conditions.check(path, expression)
    unknown = sorted(conditions.names(expression) - gates.FIELDS)
    if unknown:
        raise ConfigError(path, f"no node reports {unknown[0]!r}", f"There are {', '.join(sorted(gates.FIELDS))}")


def plan(request: RolloutRequest, model: Model, fleet: Iterable[Node], serving: Mapping[str, BlobRef]) -> RolloutPlan:
    """The plan of a roll-out.

    Args:
        serving: what nodes serve of this model now; on failure each goes back to it, or stops serving.

    Raises:
        NotFound: no such release, or no node in the cohort.
        ConfigError: a region without nodes, or numbers that no wave can meet.
    """
    check_expressions(request)
    release = _release(request, model)
    nodes = [n for n in fleet if matches(n, request.selector) and common(n.capabilities.protocol) is not None]
    groups = _groups(request, nodes)
    waves = [
        _wave(request, number, region, [n for n in nodes if n.region == region], release.ref.digest)
        for number, group in enumerate(groups)
        for region in group
    ]
    chosen = [n for n in nodes if any(n.region == w.region for w in waves)]
    previous = {n.name: serving[n.name] for n in chosen if n.name in serving}
    _check_incumbents(request, waves, previous)
    most_served = Counter(previous.values()).most_common(1)
    return RolloutPlan(
        model=model.name,
        release=release.ref,
        version=release.manifest.version,
        previous=previous,
        fallback=most_served[0][0] if most_served else None,
        selector=request.selector,
        waves=waves,
        slices=_slices(request, chosen),
        timezones=_timezones(request, chosen),
        min_success=request.min_success if request.min_success is not None else 1.0 - request.max_error,
        approve_after_canary="canary" in request.approve,
        terms=_terms(request, waves),
        **{name: getattr(request, name) for name in _TAKEN_OVER},
    )


_TAKEN_OVER = (
    *("max_error", "min_attempted", "claim_deadline_s", "finish_deadline_s", "cache_deadline_s", "bake", "gates"),
    *("on_inconclusive", "gate_deadline_s", "rate", "catch_up_in_flight", "on_failure", "region_bytes_per_s"),
)


def _release(request: RolloutRequest, model: Model) -> Release:
    wanted = request.version or len(model.releases)
    for release in model.releases:
        if release.manifest.version == wanted:
            return release
    raise NotFound(f"model {request.model!r} has no release {wanted or ''}".strip(), "See `fedtide model ls`")


def _groups(request: RolloutRequest, nodes: Sequence[Node]) -> list[list[str]]:
    known = sorted({n.region for n in nodes})
    if not known:
        raise NotFound("no node belongs to the cohort", "See `fedtide fleet ls`")
    groups = [[g] if isinstance(g, str) else g for g in request.regions] or [[region] for region in known]
    named = [region for group in groups for region in group]
    for region in [*named, *(a for a in request.approve if a != "canary")]:
        if region not in known:
            raise ConfigError(
                f"regions: {region}", "no node of the cohort is in this region", f"Known: {', '.join(known)}"
            )
    twice = [region for region, count in Counter(named).items() if count > 1]
    if twice:
        raise ConfigError(f"regions: {twice[0]}", "is listed twice")
    return groups


def _wave(request: RolloutRequest, group: int, region: str, nodes: Sequence[Node], salt: str) -> WavePlan:
    # Online nodes come first: an offline canary would only delay the wave.
    cohort = sorted(nodes, key=lambda n: (not n.online, _rank(salt, n.name)))
    wanted = math.ceil(len(cohort) * request.canary) if request.canary < 1 else int(request.canary)
    count = min(len(cohort), wanted)
    for size in [s for s in (count, len(cohort)) if s]:
        if request.min_attempted > size:
            remedy = f"Ask for at least {request.min_attempted} canaries, or lower it"
            raise ConfigError("min_attempted", f"is {request.min_attempted}, {region} has a stage of {size}", remedy)
    names = _covering(cohort, request.canary_by)
    return WavePlan(
        region=region, canaries=names[:count], nodes=names[count:], group=group, approval=region in request.approve
    )


def _check_incumbents(request: RolloutRequest, waves: Sequence[WavePlan], previous: Mapping[str, BlobRef]) -> None:
    """A gate that compares needs something to compare with."""
    comparing = [g.kind for g in request.gates if isinstance(g, PairedGate | DisagreementGate | LatencyGate)]
    for wave in waves:
        if comparing and not any(n in previous for n in wave.canaries or wave.nodes):
            what = f"compares with the previous release, but no node of the first stage in {wave.region} serves one"
            raise ConfigError(f"gates: {comparing[0]}", what, "Leave it out for the first release")


def _covering(cohort: Sequence[Node], labels: Sequence[str]) -> list[str]:
    """The nodes, ordered so that every combination of label values comes early: an untried class cannot fail."""
    strata: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for node in cohort:
        strata[tuple(node.labels.get(label, "") for label in labels)].append(node.name)
    turns = [(turn, name) for names in strata.values() for turn, name in enumerate(names)]
    return [name for _, name in sorted(turns, key=lambda t: t[0])]


def _slices(request: RolloutRequest, nodes: Sequence[Node]) -> dict[str, list[str]]:
    sliced = (g.slices for g in request.gates if isinstance(g, PairedGate | DisagreementGate))
    found: dict[str, list[str]] = defaultdict(list)
    for label in dict.fromkeys(label for labels in sliced for label in labels):
        for node in nodes:
            found[f"{label}={node.labels.get(label, '')}"].append(node.name)
    return dict(found)


def _timezones(request: RolloutRequest, nodes: Sequence[Node]) -> dict[str, str]:
    if request.window is None or request.window.timezone is not None:
        return {}
    return {n.name: n.capabilities.timezone for n in nodes}


def _terms(request: RolloutRequest, waves: Sequence[WavePlan]) -> Terms:
    paired = any(isinstance(g, PairedGate | MetricGate) for g in request.gates)
    watched = bool(request.gates) or request.bake.inferences > 0
    shadowed = any(isinstance(g, DisagreementGate | LatencyGate | MetricGate) for g in request.gates)
    limits = [limit for limit in (request.node_bytes_per_s,) if limit is not None]
    if request.region_bytes_per_s is not None:
        # However many nodes of a region fetch at once, together they stay below its limit.
        most = max(min(request.rate.in_flight, len(w.canaries) + len(w.nodes)) for w in waves)
        limits.append(max(1, request.region_bytes_per_s // most))
    return Terms(
        bytes_per_s=min(limits, default=None),
        window=request.window,
        new_interface=request.new_interface,
        measure=watched,
        watch_s=request.bake.seconds + request.gate_deadline_s,
        holdout=request.holdout if request.holdout is not None else HOLDOUT * paired,
        shadow=request.shadow if request.shadow is not None else SHADOW * shadowed,
        report_s=request.report_s,
    )


def _rank(salt: str, node: str) -> str:
    return hashlib.sha256(f"{salt}/{node}".encode()).hexdigest()


def least_seconds(plan: RolloutPlan, wan_bytes: Mapping[str, int], release_bytes: int) -> float:
    """How long the roll-out takes at least, as far as its own limits say: bakes, rates, bandwidths."""
    groups: dict[int, float] = defaultdict(float)
    for wave in plan.waves:
        groups[wave.group] = max(groups[wave.group], _wave_seconds(plan, wave, wan_bytes, release_bytes))
    return sum(groups.values())


def _wave_seconds(plan: RolloutPlan, wave: WavePlan, wan_bytes: Mapping[str, int], release_bytes: int) -> float:
    seconds = plan.bake.seconds
    if plan.region_bytes_per_s is not None:
        seconds += wan_bytes.get(wave.region, 0) / plan.region_bytes_per_s
    for stage in [s for s in (wave.canaries, wave.nodes) if s]:
        if plan.terms.bytes_per_s is not None:
            seconds += math.ceil(len(stage) / plan.rate.in_flight) * release_bytes / plan.terms.bytes_per_s
        rate, due = plan.rate.per_minute or math.inf, 0.0
        for _ in stage[1:]:
            rate = min(rate * plan.rate.growth, plan.rate.most_per_minute) if plan.rate.per_minute else math.inf
            due += 60 / rate
        seconds += due
    return seconds
