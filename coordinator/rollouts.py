"""A roll-out: one release to a cohort of nodes, region by region, and back when it is worse.

    (none) --RolloutStarted--> Rolling(wave 0) --gates pass--> Rolling(wave n) ... --> Completed
                                  |    \\--gate cannot be evaluated--> Paused
                                  \\--error gate, or abort--> RolledBack

Gate order, each time something is reported: abort, error threshold, inconclusive, success. The
denominator is the nodes that attempted (reached an end, or took the release and got stuck);
nodes that never took it by the claim deadline leave the wave and take it when they return.
"Everything has ended" alone never promotes. Pure; times come from the events.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from typing import Literal

from coordinator.commands import Commands, SetAlarm, SetDesired
from fabric.blobs import BlobRef
from fabric.errors import InvalidTransition
from fabric.events import (
    AlarmRang,
    NodePhaseReported,
    RolloutAbortRequested,
    RolloutStarted,
)
from fabric.rollout_plan import NodePhase, RolloutPlan, WavePlan

RolloutEvent = RolloutStarted | RolloutAbortRequested | NodePhaseReported | AlarmRang

FAILED: frozenset[NodePhase] = frozenset({"failed", "rolled_back", "rejected"})
ENDED: frozenset[NodePhase] = FAILED | {"confirmed", "timed_out", "superseded"}

Stage = Literal["canary", "rest"]


@dataclass(frozen=True, slots=True)
class NodeState:
    """The last phase that counts; `claimed` once the node was heard of in this roll-out."""

    phase: NodePhase
    reason: str = ""
    claimed: bool = False


@dataclass(frozen=True, slots=True)
class Facts:
    rollout: str
    plan: RolloutPlan
    counter: int
    by: str
    started_at: datetime


@dataclass(frozen=True, slots=True)
class Rolling:
    """Wave `wave` is under way; `nodes` holds every node that was offered the release so far."""

    facts: Facts
    wave: int
    stage: Stage
    stage_opened_at: datetime
    nodes: Mapping[str, NodeState]
    wave_seconds: tuple[float, ...] = ()
    wave_opened_at: datetime | None = None


@dataclass(frozen=True, slots=True)
class Paused:
    at: Rolling
    reason: str

    @property
    def facts(self) -> Facts:
        return self.at.facts

    @property
    def nodes(self) -> Mapping[str, NodeState]:
        return self.at.nodes


@dataclass(frozen=True, slots=True)
class Completed:
    facts: Facts
    nodes: Mapping[str, NodeState]
    wave_seconds: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class RolledBack:
    """Every node that was offered the release is told to serve the previous one, under a higher counter."""

    facts: Facts
    reason: str
    nodes: Mapping[str, NodeState]
    restored: frozenset[str] = field(default_factory=frozenset)


@dataclass(frozen=True, slots=True)
class Superseded:
    facts: Facts
    nodes: Mapping[str, NodeState]
    by: str


Rollout = Rolling | Paused | Completed | RolledBack | Superseded
Step = tuple[Rollout, Commands]


def step(state: Rollout | None, event: RolloutEvent, at: datetime) -> Step:
    """The roll-out after `event`.

    Raises:
        InvalidTransition: started twice, or never.
    """
    if isinstance(event, RolloutStarted):
        if state is not None:
            raise InvalidTransition(f"roll-out {event.rollout} was started twice")
        return _open(Facts(event.rollout, event.plan, event.counter, event.by, at), 0, {}, (), at)
    if state is None:
        name = event.id if isinstance(event, AlarmRang) else event.rollout
        raise InvalidTransition(f"{event.kind} for a roll-out {name} that was never started")
    match state, event:
        case RolledBack(), NodePhaseReported(phase="confirmed", node=node) if event.counter > state.facts.counter:
            return replace(state, restored=state.restored | {node}), ()
        case ((Rolling() | Paused()), RolloutAbortRequested(reason=reason)):
            return _roll_back(state.facts, state.nodes, f"aborted: {reason}")
        case Rolling(), NodePhaseReported() if event.counter == state.facts.counter and event.node in state.nodes:
            return _settle(_note(state, event), at)
        case Rolling(), AlarmRang(key=key) if key == alarm_key(state):
            return _settle(_time_out(state), at)
        case _:
            return state, ()


def served_after(state: Rollout, event: NodePhaseReported) -> BlobRef | None:
    """What a node serves once it confirmed: the release, or what it went back to under the higher counter."""
    plan = state.facts.plan
    return plan.release if event.counter == state.facts.counter else plan.previous.get(event.node)


def supersede(state: Rollout, by: str) -> Rollout:
    """What becomes of a roll-out when a newer one of the same model starts."""
    match state:
        case Rolling() | Paused():
            return Superseded(state.facts, state.nodes, by)
        case RolledBack():
            # What it still owes absent nodes is now the newer one's to say.
            return replace(state, restored=frozenset(state.nodes))
        case _:
            return state


def alarm_key(state: Rolling) -> str:
    return f"{state.wave}-{state.stage}"


def cohort(state: Rolling) -> list[str]:
    """The nodes whose outcome decides the present stage."""
    wave = state.facts.plan.waves[state.wave]
    return wave.canaries if state.stage == "canary" else [*wave.canaries, *wave.nodes]


def _note(state: Rolling, event: NodePhaseReported) -> Rolling:
    known = state.nodes[event.node]
    if known.phase in ENDED and known.phase != "timed_out":
        return state
    return replace(state, nodes={**state.nodes, event.node: NodeState(event.phase, event.reason, claimed=True)})


def _time_out(state: Rolling) -> Rolling:
    nodes = dict(state.nodes)
    for name in cohort(state):
        if nodes[name].phase not in ENDED:
            stuck = nodes[name].claimed
            reason = f"stuck in {nodes[name].phase}" if stuck else "did not take the release by the claim deadline"
            nodes[name] = NodeState("timed_out", reason, stuck)
    return replace(state, nodes=nodes)


def _settle(state: Rolling, at: datetime) -> Step:
    plan = state.facts.plan
    states = [state.nodes[n] for n in cohort(state)]
    failed = [s for s in states if s.phase in FAILED or (s.phase == "timed_out" and s.claimed)]
    confirmed = sum(s.phase == "confirmed" for s in states)
    attempted = len(failed) + confirmed
    if attempted >= plan.min_attempted and len(failed) / attempted > plan.max_error:
        return _roll_back(state.facts, state.nodes, _why_failed(state, failed, attempted))
    if any(s.phase not in ENDED for s in states):
        return state, ()
    where = f"{plan.waves[state.wave].region}, {state.stage}"
    if attempted < max(1, plan.min_attempted):
        return Paused(state, f"{where}: {attempted} nodes attempted, the gates need {plan.min_attempted}"), ()
    if confirmed / attempted < plan.min_success:
        share = f"{confirmed} of {attempted} confirmed, required are {plan.min_success:.0%}"
        return Paused(state, f"{where}: {share}"), ()
    return _advance(state, at)


def _why_failed(state: Rolling, failed: list[NodeState], attempted: int) -> str:
    wave = state.facts.plan.waves[state.wave]
    share = f"{len(failed)} of {attempted} attempted nodes failed, allowed are {state.facts.plan.max_error:.0%}"
    return f"{wave.region}, {state.stage}: {share}; first reason: {failed[0].reason or failed[0].phase}"


def _advance(state: Rolling, at: datetime) -> Step:
    facts, wave = state.facts, state.facts.plan.waves[state.wave]
    if state.stage == "canary" and wave.nodes:
        rest = replace(state, stage="rest", stage_opened_at=at, nodes={**state.nodes, **_offered(wave.nodes)})
        return rest, owed(rest)
    opened = state.wave_opened_at or state.stage_opened_at
    seconds = (*state.wave_seconds, (at - opened).total_seconds())
    if state.wave + 1 == len(facts.plan.waves):
        return Completed(facts, state.nodes, seconds), ()
    return _open(facts, state.wave + 1, state.nodes, seconds, at)


def _open(facts: Facts, wave: int, nodes: Mapping[str, NodeState], seconds: tuple[float, ...], at: datetime) -> Step:
    plan: WavePlan = facts.plan.waves[wave]
    stage: Stage = "canary" if plan.canaries else "rest"
    offered = _offered(plan.canaries or plan.nodes)
    rolling = Rolling(facts, wave, stage, at, {**nodes, **offered}, seconds, at)
    return rolling, owed(rolling)


def _offered(nodes: list[str]) -> dict[str, NodeState]:
    return {name: NodeState("offered") for name in nodes}


def _roll_back(facts: Facts, nodes: Mapping[str, NodeState], reason: str) -> Step:
    back = RolledBack(facts, reason, nodes)
    return back, owed(back)


def owed(state: Rollout) -> Commands:
    """What this state still wants done: issued on entry, and again after a restart."""
    match state:
        case Rolling(facts=facts):
            plan = facts.plan
            offers = tuple(
                SetDesired(name, plan.model, facts.counter, facts.rollout, plan.release)
                for name in cohort(state)
                if state.nodes[name].phase not in ENDED
            )
            due = state.stage_opened_at + timedelta(seconds=plan.claim_deadline_s)
            return (*offers, SetAlarm("rollout", facts.rollout, alarm_key(state), due))
        case RolledBack(facts=facts, restored=restored):
            plan = facts.plan
            return tuple(
                SetDesired(name, plan.model, facts.counter + 1, facts.rollout, plan.previous.get(name))
                for name in sorted(state.nodes.keys() - restored)
            )
        case _:
            return ()
