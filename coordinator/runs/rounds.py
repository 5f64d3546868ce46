"""A round as the coordinator sees it: who was asked, who answered, who does not count and why.

`TRANSITIONS` defines which state may follow which. After its training phase a round may open again for evaluation. The
coordinator keeps the deadlines: its alarms survive the crash of any process, and it tells the aggregator when one has
rung. A node's answer to one phase of one trial of a round counts once, even if it is delivered again. Pure.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime

from fedtide.coordinator.commands import Commands, SetAlarm, TellTimeIsUp
from fedtide.coordinator.transitions import Transition
from fedtide.fabric.events.runs import (
    RoundAbandoned,
    RoundClosed,
    RoundCollected,
    RoundOpened,
    UpdateReceived,
    UpdateRefused,
)
from fedtide.fabric.plans.round_policy import Cause, RoundPolicy
from fedtide.fabric.times import later

RoundEvent = RoundOpened | UpdateReceived | UpdateRefused | RoundCollected | RoundAbandoned | RoundClosed


@dataclass(frozen=True, slots=True)
class RefusedAnswer:
    category: str
    reason: str


@dataclass(frozen=True, slots=True)
class Tally:
    """One phase (train, evaluate, ...) of a round. A node is in one of `received`, `refused`, or awaited.

    `stale`: the nodes in `received` whose update answers a task of an earlier round. `rang`: the alarm
    that ended the wait. `cause`: why the phase ended, as the aggregator reported it.
    """

    asked: frozenset[str] = frozenset()
    received: frozenset[str] = frozenset()
    refused: Mapping[str, RefusedAnswer] = field(default_factory=dict)
    stale: frozenset[str] = frozenset()
    bytes_down: int = 0
    bytes_up: int = 0
    quorum: int | None = None
    opened_at: datetime | None = None
    quorum_at: datetime | None = None
    rang: Cause | None = None
    cause: Cause | None = None

    @property
    def awaited(self) -> frozenset[str]:
        return self.asked - self.received - self.refused.keys()


@dataclass(frozen=True, slots=True)
class Open:
    """Tasks of `phase` are out and nobody has answered. `before` says why earlier trials were abandoned."""

    number: int
    trial: int
    phase: str
    phases: Mapping[str, Tally]
    before: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Collecting:
    number: int
    trial: int
    phase: str
    phases: Mapping[str, Tally]
    before: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Aggregating:
    number: int
    trial: int
    phase: str
    phases: Mapping[str, Tally]
    before: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Closed:
    number: int
    trial: int
    phases: Mapping[str, Tally]
    metrics: Mapping[str, float]
    seconds: float
    before: tuple[str, ...] = ()
    updates: str = ""
    """Root of the Merkle tree of its updates; empty: nothing was trained, or nobody told."""


@dataclass(frozen=True, slots=True)
class Abandoned:
    number: int
    trial: int
    phases: Mapping[str, Tally]
    reason: str
    before: tuple[str, ...] = ()


Round = Open | Collecting | Aggregating | Closed | Abandoned

TRANSITIONS: tuple[Transition, ...] = (
    Transition(None, "tasks are out", Open),
    Transition(Open, "first answer", Collecting),
    Transition(Open, "nobody has to answer", Aggregating),
    Transition(Collecting, "enough answers, or the time is up", Aggregating),
    Transition(Collecting, "the next phase, or another trial", Open),
    Transition(Aggregating, "the next phase, or another trial", Open),
    Transition(Aggregating, "the model is updated", Closed),
    Transition(Open, "too few answers, or the run ended", Abandoned),
    Transition(Collecting, "too few answers, or the run ended", Abandoned),
    Transition(Aggregating, "it failed, or the run ended", Abandoned),
    Transition(Abandoned, "another trial", Open),
    # An aggregator reports in its own order; what was said before may have been lost with a process.
    Transition(None, "an answer came before the report of its task", Collecting),
    Transition(None, "the report of its tasks was lost", Aggregating),
    Transition(None, "the report of its tasks was lost", Closed),
    Transition(None, "the report of its tasks was lost", Abandoned),
    Transition(Open, "the report of its answers was lost", Closed),
    Transition(Collecting, "the report of its collection was lost", Closed),
    Transition(Abandoned, "the last report of a resumed round", Closed),
    Transition(Closed, "another trial", Open),
)
"""Every change of state. A state may also follow itself."""


def step(state: Round | None, event: RoundEvent, at: datetime) -> Round:
    """The round after `event`, which happened at `at`; answers to a closed round change only its tallies."""
    match event:
        case RoundClosed():
            return _closed(state, event)
        case RoundOpened():
            return _opened(state, event, at)
        case _ if state is not None and event.trial != state.trial:
            return state
        case RoundAbandoned(reason=reason):
            phases = {} if state is None else state.phases
            before = () if state is None else state.before
            over = isinstance(state, Closed)
            return state if over and state else Abandoned(event.round, event.trial, phases, reason, before)
        case RoundCollected(phase=phase, cause=cause):
            state = state if state is not None else Open(event.round, event.trial, phase, {})
            if not isinstance(state, Open | Collecting) or phase != state.phase:
                return state
            phases = {**state.phases, phase: replace(state.phases.get(phase, Tally()), cause=cause)}
            return Aggregating(state.number, state.trial, phase, phases, state.before)
        case UpdateReceived() | UpdateRefused():
            state = state if state is not None else Open(event.round, event.trial, event.phase, {})
            return _answered(state, event, at)


def _closed(state: Round | None, event: RoundClosed) -> Round:
    if isinstance(state, Closed):
        return state
    if state is None:
        return Closed(event.round, 1, {}, event.metrics, event.seconds, updates=event.updates)
    closed = Closed(event.round, state.trial, state.phases, event.metrics, event.seconds, state.before)
    return replace(closed, updates=event.updates)


def _opened(state: Round | None, event: RoundOpened, at: datetime) -> Round:
    phase = event.phase
    fresh = Tally(
        frozenset(event.nodes),
        bytes_down=event.bytes_down,
        quorum=event.quorum,
        opened_at=at if event.resumable and event.timed else None,
    )
    if state is None:
        return Open(event.round, event.trial, phase, {phase: fresh})
    if event.trial > state.trial:
        why = state.reason if isinstance(state, Abandoned) else "given up"
        return Open(event.round, event.trial, phase, {phase: fresh}, (*state.before, why))
    tally = state.phases.get(phase)
    if event.trial < state.trial or (tally is not None and tally.asked.issuperset(event.nodes)):
        return state  # a resumed round asks the same nodes again
    if tally is not None:
        fresh = replace(
            tally, asked=tally.asked | fresh.asked, bytes_down=tally.bytes_down + event.bytes_down, quorum=event.quorum
        )
    phases = {**state.phases, phase: fresh}
    if isinstance(state, Closed | Abandoned):
        return replace(state, phases=phases)
    return Open(state.number, state.trial, phase, phases, state.before)


def _answered(state: Round, event: UpdateReceived | UpdateRefused, at: datetime) -> Round:
    tally, node = state.phases.get(event.phase, Tally()), event.node
    match event:
        case UpdateReceived(bytes_up=size, staleness=staleness):
            if node in tally.received or node in tally.refused:
                return state
            received = tally.received | {node}
            tally = replace(tally, received=received, bytes_up=tally.bytes_up + size)
            if staleness:
                tally = replace(tally, stale=tally.stale | {node})
            if tally.quorum is not None and len(received) == tally.quorum:
                tally = replace(tally, quorum_at=at)
        case UpdateRefused(category=category, reason=reason):
            taken_back = node in tally.received and category in _JUDGED_TOGETHER
            if not taken_back and (node in tally.received or not _says_more(tally.refused.get(node), category)):
                return state
            refused = {**tally.refused, node: RefusedAnswer(category, reason)}
            tally = replace(tally, received=tally.received - {node}, refused=refused)
    phases = {**state.phases, event.phase: tally}
    if isinstance(state, Open) and state.phase == event.phase:
        return Collecting(state.number, state.trial, state.phase, phases, state.before)
    return replace(state, phases=phases)


_JUDGED_TOGETHER = ("wrong_shape", "bad_weight", "malformed")
"""Reasons that show only beside the other answers: such an answer was received first."""


def _says_more(known: RefusedAnswer | None, category: str) -> bool:
    """Whether a refusal replaces the known one: only if a node that was given up has answered too late after all."""
    return known is None or (category == "late" and known.category in ("timeout", "node_lost", "not_needed"))


def after_alarm(state: Round, key: str, run: str, policy: RoundPolicy) -> Round:
    """The round after an alarm has rung; an alarm that the round does not wait for changes nothing."""
    if not isinstance(state, Open | Collecting):
        return state
    for alarm, cause in _alarms(state, run, policy):
        if alarm.key == key:
            tally = replace(state.phases[state.phase], rang=cause)
            return replace(state, phases={**state.phases, state.phase: tally})
    return state


def pending_commands(state: Round, run: str, policy: RoundPolicy) -> Commands:
    """The commands of an open round: set its alarms, or tell the aggregator that one has rung."""
    if not isinstance(state, Open | Collecting):
        return ()
    tally = state.phases.get(state.phase, Tally())
    if tally.rang is not None:
        return (TellTimeIsUp(run, state.number, state.trial, state.phase, tally.rang),)
    return tuple(alarm for alarm, _ in _alarms(state, run, policy))


def _alarms(state: Open | Collecting, run: str, policy: RoundPolicy) -> list[tuple[SetAlarm, Cause]]:
    tally = state.phases.get(state.phase, Tally())
    if tally.opened_at is None:
        return []

    def alarm(what: str, since: datetime, seconds: float) -> SetAlarm:
        # A clock that was restarted (after a pause) gets an alarm with another key.
        key = f"{state.number}.{state.trial}.{state.phase}.{what}.{since.timestamp():.0f}"
        return SetAlarm("run", run, key, later(since, seconds))

    alarms: list[tuple[SetAlarm, Cause]] = [(alarm("deadline", tally.opened_at, policy.deadline_s), "deadline")]
    if tally.quorum_at is not None and policy.grace_s > 0:
        alarms.append((alarm("grace", tally.quorum_at, policy.grace_s), "grace over"))
    return alarms


def restart_clock(state: Round, at: datetime) -> Round:
    """After a pause an open round has its whole time again."""
    if not isinstance(state, Open | Collecting) or state.phase not in state.phases:
        return state
    tally = state.phases[state.phase]
    if tally.opened_at is None:
        return state
    quorum_at = at if tally.quorum_at is not None else None
    again = replace(tally, opened_at=at, quorum_at=quorum_at, rang=None)
    return replace(state, phases={**state.phases, state.phase: again})


def end(state: Round, outcome: str) -> Round:
    """What becomes of a round when its run ends. One that an app runs by itself is closed when the run is completed."""
    if isinstance(state, Closed | Abandoned):
        return state
    untimed = all(tally.opened_at is None for tally in state.phases.values())
    if outcome == "completed" and untimed:
        return Closed(state.number, state.trial, state.phases, {}, 0.0, state.before)
    reason = f"the run is {outcome}"
    return Abandoned(state.number, state.trial, state.phases, reason, state.before)
