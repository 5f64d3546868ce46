"""A roll-out: one release to a fleet, wave by wave (`waves`), and back when it is worse.

    (none) --RolloutStarted--> Rolling --every wave over--> Completed
                                  |  \\\\--a gate that cannot decide, or a person--> Paused --resume--> Rolling
                                  \\\\--errors, a failed gate, or a person--> RolledBack

The states, what they mean and what they owe; `rollout_steps` says how one follows from another. Pure.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime

from fedtide.coordinator.commands import Commands, SetAlarm
from fedtide.coordinator.rollouts import waves
from fedtide.coordinator.rollouts.waves import Facts, NodeState, Over, Report, TakenBack, Wave
from fedtide.fabric.events.envelope import AlarmRang
from fedtide.fabric.events.rollouts import (
    NodePhaseReported,
    RegionCacheFailed,
    RolloutAbortRequested,
    RolloutNextRequested,
    RolloutPauseRequested,
    RolloutPromoteRequested,
    RolloutResumeRequested,
    RolloutRetryRequested,
    RolloutRollbackRequested,
    RolloutStarted,
)
from fedtide.fabric.tensors.blobs import BlobRef

Wish = (
    RolloutAbortRequested
    | RolloutRollbackRequested
    | RolloutPauseRequested
    | RolloutResumeRequested
    | RolloutPromoteRequested
    | RolloutNextRequested
    | RolloutRetryRequested
)
RolloutEvent = RolloutStarted | Report | RegionCacheFailed | Wish | AlarmRang


@dataclass(frozen=True, slots=True)
class Rolling:
    """`group`: waves up to this one may be under way. `alarms`: how many have rung. `dues`: of each wave."""

    facts: Facts
    waves: tuple[Wave, ...]
    group: int = 0
    alarms: int = 0
    due: datetime | None = None
    dues: tuple[datetime | None, ...] = ()


@dataclass(frozen=True, slots=True)
class Paused:
    """Nothing is offered and nothing decided, but what nodes report is noted, and errors still take it back."""

    at: Rolling
    reason: str

    @property
    def facts(self) -> Facts:
        return self.at.facts

    @property
    def waves(self) -> tuple[Wave, ...]:
        return self.at.waves


@dataclass(frozen=True, slots=True)
class Completed:
    """Every wave is over; nodes that come back are still served, unless that was `stopped` for a reason.

    `followed`: by a newer roll-out of the model, which serves them from now on.
    """

    facts: Facts
    waves: tuple[Wave, ...]
    ended_at: datetime
    stopped: str = ""
    followed: bool = False
    alarms: int = 0
    due: datetime | None = None
    dues: tuple[datetime | None, ...] = ()


@dataclass(frozen=True, slots=True)
class RolledBack:
    """Every node that was offered the release is told to serve the previous one, under a higher counter."""

    facts: Facts
    waves: tuple[Wave, ...]
    reason: str
    at: datetime
    restored: frozenset[str] = field(default_factory=frozenset)
    stuck: Mapping[str, str] = field(default_factory=dict)
    """Nodes that could not go back, with the reason."""
    followed: bool = False
    """By a newer roll-out of the model: nodes that join from now on are its business."""


@dataclass(frozen=True, slots=True)
class Superseded:
    facts: Facts
    waves: tuple[Wave, ...]
    by: str


Rollout = Rolling | Paused | Completed | RolledBack | Superseded


def served_after(state: Rollout, event: NodePhaseReported) -> BlobRef | None:
    """What a node serves once it confirmed: the release, or what it went back to under the higher counter."""
    known = nodes_of(state).get(event.node)
    if known is not None and known.counter == event.counter:
        return state.facts.plan.release
    return waves.release_before(state.facts.plan, event.node)


def supersede(state: Rollout, by: str) -> Rollout:
    """What becomes of a roll-out when a newer one of the same model starts."""
    match state:
        case Rolling() | Paused():
            return Superseded(state.facts, state.waves, by)
        case Completed():
            return replace(state, stopped=f"superseded by {by}", followed=True, due=None, dues=())
        case RolledBack():
            # What it still owes absent nodes is now the newer one's to say.
            return replace(state, restored=frozenset(nodes_of(state)), followed=True)
        case _:
            return state


def nodes_of(state: Rollout) -> Mapping[str, NodeState]:
    """Every node that was offered the release so far, or waits in the catch-up cohort."""
    return {name: known for wave in state.waves for name, known in waves.nodes_of(wave).items()}


def holders(state: Rollout) -> frozenset[str]:
    """The nodes that were offered the release, and may have it."""
    return frozenset(n for n, s in nodes_of(state).items() if not (s.back and not s.claimed))


def is_open(state: Rollout) -> bool:
    return isinstance(state, Rolling | Paused)


def wants_alarm(state: Rollout, key: str) -> bool:
    return isinstance(state, Rolling | Completed) and state.due is not None and key == alarm_key(state)


def alarm_key(state: Rolling | Completed) -> str:
    return f"{type(state).__name__.lower()}-{state.alarms}"


def owed(state: Rollout) -> Commands:
    """What this state still wants done: issued on entry, and again after a restart."""
    match state:
        case Rolling() | Completed(stopped=""):
            due = () if state.due is None else (SetAlarm("rollout", state.facts.rollout, alarm_key(state), state.due),)
            return (*(c for i, w in enumerate(state.waves) for c in waves.owed(state.facts, i, w)), *due)
        case Paused():
            kept = [(i, w) for i, w in enumerate(state.waves) if isinstance(w, TakenBack | Over)]
            return tuple(c for i, w in kept for c in waves.owed(state.facts, i, w))
        case RolledBack(facts=facts, restored=restored):
            return waves.take_back(facts, holders(state) - restored)
        case Superseded(facts=facts):
            # Who has it and is no business of the newer one keeps it, and is watched no more.
            return tuple(waves.settle(facts, n, s) for n, s in nodes_of(state).items() if s.phase == "confirmed")
        case _:
            return ()
