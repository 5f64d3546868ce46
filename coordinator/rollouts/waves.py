"""One wave of a roll-out: a region's nodes, its canaries first.

    Waiting --its turn--> Caching --RegionCached--> Offering(canary) --all ended--> Baking(canary)
        --bake over, gates pass--> Offering(rest) --> Baking(rest) --gates pass--> Over
    any of them --a failure the plan answers with `rollback_wave`--> TakenBack

What its states mean, what reports change in them, and what they owe; `wave_steps` says how one
follows from another. Pure.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from typing import Literal, TypeVar

from fedtide.coordinator.commands import CacheRelease, Command, Commands, SetDesired
from fedtide.fabric.events.rollouts import NodeMeasured, NodePhaseReported, RegionCached
from fedtide.fabric.plans.rollout_plan import Measured, NodePhase, RolloutPlan, Terms
from fedtide.fabric.tensors.blobs import BlobRef

FAILED: frozenset[NodePhase] = frozenset({"failed", "rolled_back", "rejected"})
ENDED: frozenset[NodePhase] = FAILED | {"confirmed", "timed_out", "superseded"}

Stage = Literal["canary", "rest", "catch_up"]


@dataclass(frozen=True, slots=True)
class Facts:
    """`counter` is the highest that the release was offered under; the one above it is kept for taking it back."""

    rollout: str
    plan: RolloutPlan
    counter: int
    by: str
    started_at: datetime


@dataclass(frozen=True, slots=True)
class NodeState:
    """The last phase that counts.

    `claimed`: heard of under this offer. `back`: missed its wave, and is there now. `away`: gone since it
    confirmed. `since`: when it confirmed. `settled`: nothing of it is watched any more (catch-up only).
    """

    phase: NodePhase
    stage: Stage
    counter: int
    offered_at: datetime
    reason: str = ""
    claimed: bool = False
    back: bool = False
    away: bool = False
    since: datetime | None = None
    settled: bool = False
    measured: Measured | None = None


@dataclass(frozen=True, slots=True)
class Cohort:
    """Every node of the wave that was offered the release so far, or came later.

    `late`: those in the catch-up cohort, or on their way to it; kept apart, because they are few among many.
    """

    opened_at: datetime
    wan_bytes: int = 0
    nodes: Mapping[str, NodeState] = field(default_factory=dict)
    late: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Waiting:
    """For its turn, or for a person."""

    approved: bool = False


@dataclass(frozen=True, slots=True)
class Caching:
    since: datetime


@dataclass(frozen=True, slots=True)
class Offering:
    """`queue`: not offered yet, in order. `allowance`: offers that the rate admits, as of `counted_at`.

    `waived`: a person said that this wave goes on whatever its gates say.
    """

    stage: Stage
    cohort: Cohort
    queue: tuple[str, ...]
    allowance: float
    counted_at: datetime
    waived: bool = False


@dataclass(frozen=True, slots=True)
class Baking:
    """Every node of the stage has ended, and enough confirmed. `waived`: as in `Offering`."""

    stage: Stage
    cohort: Cohort
    since: datetime
    waived: bool = False


@dataclass(frozen=True, slots=True)
class Over:
    cohort: Cohort
    seconds: float


@dataclass(frozen=True, slots=True)
class TakenBack:
    """`restored` nodes confirmed that they serve what they served before."""

    cohort: Cohort
    reason: str
    restored: frozenset[str] = frozenset()


Wave = Waiting | Caching | Offering | Baking | Over | TakenBack
Staged = Offering | Baking

BACK = Terms(new_interface=True)
"""How a node goes back: at once, and to whatever it served."""

Report = NodePhaseReported | NodeMeasured | RegionCached
W = TypeVar("W", bound=Wave)


@dataclass(frozen=True, slots=True)
class Trouble:
    """`failed`: the plan's action follows. Otherwise a person has to look."""

    reason: str
    failed: bool


def open_wave(facts: Facts, index: int, at: datetime) -> tuple[Wave, Commands]:
    return Caching(at), (_cache(facts, index),)


def cached(facts: Facts, index: int, wave: Caching, wan_bytes: int, at: datetime) -> Offering:
    """The region has the release: its canaries may be offered it."""
    plan = facts.plan.waves[index]
    stage: Stage = "canary" if plan.canaries else "rest"
    return Offering(stage, Cohort(wave.since, wan_bytes), tuple(plan.canaries or plan.nodes), 1.0, at)


def nodes_of(wave: Wave) -> Mapping[str, NodeState]:
    return {} if isinstance(wave, Waiting | Caching) else wave.cohort.nodes


def with_nodes(wave: W, changed: Mapping[str, NodeState], wan_bytes: int = 0) -> W:
    """The wave with some of its nodes in another state."""
    if isinstance(wave, Waiting | Caching) or not changed:
        return wave
    known = wave.cohort
    late = {name for name, state in changed.items() if state.back or state.stage == "catch_up"}
    cohort = Cohort(
        known.opened_at,
        known.wan_bytes + wan_bytes,
        {**known.nodes, **changed},
        known.late | late if late else known.late,
    )
    return replace(wave, cohort=cohort)


def note(wave: Wave, event: NodePhaseReported, at: datetime) -> Wave:
    """What a node reported of itself; its first end counts, and nothing under another counter."""
    known = nodes_of(wave).get(event.node)
    if known is None or known.counter != event.counter:
        return wave
    if known.phase in ENDED and known.phase != "timed_out":
        return wave
    if event.phase == "timed_out":
        # It is there, but its offer had expired when it came: once, it gets another.
        if known.claimed or known.stage == "catch_up":
            return wave
        return with_nodes(wave, {event.node: replace(known, phase="timed_out", reason=event.reason, back=True)})
    late = isinstance(wave, Over) and known.phase == "timed_out"
    told = replace(
        known,
        phase=event.phase,
        stage="catch_up" if late else known.stage,
        reason=event.reason,
        claimed=True,
        back=False,
        since=at if event.phase == "confirmed" else None,
    )
    return with_nodes(wave, {event.node: told}, event.wan_bytes)


def measure(wave: Wave, node: str, counter: int, measured: Measured) -> Wave:
    known = nodes_of(wave).get(node)
    if known is None or known.counter != counter or known.phase in FAILED:
        return wave
    return with_nodes(wave, {node: replace(known, measured=measured)})


def reported(facts: Facts, all_waves: tuple[Wave, ...], event: Report, at: datetime) -> tuple[Wave, ...]:
    """The waves after a report; the same object if it says nothing new."""
    changed = list(all_waves)
    for index, wave in enumerate(all_waves):
        match event, wave:
            case RegionCached(region=region), Caching() if region == facts.plan.waves[index].region:
                changed[index] = cached(facts, index, wave, event.wan_bytes, at)
            case NodeMeasured(node=node), _:
                changed[index] = measure(wave, node, event.counter, event.measured)
            case NodePhaseReported(phase="confirmed", node=node), TakenBack(restored=restored, cohort=cohort):
                if node in cohort.nodes and event.counter > facts.counter:
                    changed[index] = replace(wave, restored=restored | {node})
            case NodePhaseReported(), _:
                changed[index] = note(wave, event, at)
            case _:
                pass
    return all_waves if all(a is b for a, b in zip(changed, all_waves, strict=True)) else tuple(changed)


def members(wave: Staged) -> dict[str, NodeState]:
    """The nodes whose outcome decides the present stage: the rest is judged with its canaries."""
    stages = ("canary",) if wave.stage == "canary" else ("canary", "rest")
    return {name: state for name, state in wave.cohort.nodes.items() if state.stage in stages}


def is_failed(state: NodeState) -> bool:
    return state.phase in FAILED or (state.phase == "timed_out" and state.claimed)


def is_absent(state: NodeState) -> bool:
    """It never took its offer."""
    return state.phase == "timed_out" and not state.claimed


def offer(facts: Facts, node: str, state: NodeState) -> SetDesired:
    plan = facts.plan
    until = state.offered_at + timedelta(seconds=plan.claim_deadline_s)
    return SetDesired(node, plan.model, state.counter, facts.rollout, plan.release, until, plan.terms)


def settle(facts: Facts, node: str, state: NodeState) -> SetDesired:
    """What a node finds from now on: the release without a deadline, and nothing to measure."""
    plan = facts.plan
    return SetDesired(node, plan.model, state.counter, facts.rollout, plan.release, None, settled_terms(plan))


def is_settled(state: NodeState) -> bool:
    """Of a node of a wave that is over: whether it serves the release for good."""
    return state.phase == "confirmed" and (state.settled or state.stage != "catch_up")


def settled_terms(plan: RolloutPlan) -> Terms:
    return plan.terms.model_copy(update={"measure": False, "holdout": 0, "shadow": 0.0})


def _cache(facts: Facts, index: int) -> CacheRelease:
    plan = facts.plan
    return CacheRelease(facts.rollout, plan.waves[index].region, facts.counter, plan.release, plan.region_bytes_per_s)


def take_back(facts: Facts, nodes: Iterable[str]) -> tuple[SetDesired, ...]:
    """Each node serves what it served before, under a higher counter."""
    plan = facts.plan
    return tuple(
        SetDesired(n, plan.model, facts.counter + 1, facts.rollout, release_before(plan, n), None, BACK)
        for n in sorted(nodes)
    )


def release_before(plan: RolloutPlan, node: str) -> BlobRef | None:
    """What a node goes back to; one that joined later, to what most served."""
    planned = any(node in w.canaries or node in w.nodes for w in plan.waves)
    return plan.previous.get(node) if planned else plan.fallback


def owed(facts: Facts, index: int, wave: Wave) -> Commands:
    """What the wave still wants done: issued on entry, and again after a restart."""
    match wave:
        case Caching():
            return (_cache(facts, index),)
        case TakenBack(cohort=cohort, restored=restored):
            return take_back(facts, cohort.nodes.keys() - restored)
        case Offering() | Baking() | Over():
            nodes = wave.cohort.nodes
            offers: list[Command] = [offer(facts, n, s) for n, s in nodes.items() if s.phase not in ENDED]
            if isinstance(wave, Over):
                offers += [settle(facts, n, s) for n, s in nodes.items() if is_settled(s)]
            return tuple(offers)
        case _:
            return ()
