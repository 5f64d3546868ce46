"""A run: one federated job from request to end.

`TRANSITIONS` defines which state may follow which, and `ACTIONS` what a person may do in each state.
A run fails when its aggregator dies MAX_CRASHES times without any progress in between. A paused
run has no aggregator; what its nodes still send waits in the stream for the next attempt. A run that failed or was
cancelled keeps its checkpoints for RESUMABLE_FOR: it may go on, in its next *life*.

Pure. Reports of an attempt that is not the current one change nothing: its process was given up.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from typing import Literal

from fedtide.coordinator.commands import (
    CleanUp,
    Commands,
    LaunchAggregator,
    StopAggregator,
    SuspendAggregator,
    TellTimeIsUp,
)
from fedtide.coordinator.runs import rounds
from fedtide.coordinator.transitions import Transition, check_transition
from fedtide.fabric.errors import InvalidTransition
from fedtide.fabric.events.envelope import AlarmRang
from fedtide.fabric.events.runs import (
    AggregatorExited,
    AggregatorStarted,
    AggregatorWaits,
    RoundAbandoned,
    RoundClosed,
    RoundCollected,
    RoundOpened,
    RoundsRestarted,
    RoundWaits,
    RunCancelRequested,
    RunCleanedUp,
    RunCompleted,
    RunFailed,
    RunPauseRequested,
    RunRequested,
    RunResumeRequested,
    RunStopRequested,
    UpdateReceived,
    UpdateRefused,
)
from fedtide.fabric.messages.requests import RunActionName
from fedtide.fabric.plans.run_spec import RunSpec
from fedtide.fabric.trace_context import Origin

MAX_CRASHES = 5
RESUMABLE_FOR = timedelta(days=14)
"""So long the checkpoints of a run that failed or was cancelled are kept."""

RunEvent = (
    RunRequested
    | RunPauseRequested
    | RunResumeRequested
    | RunCancelRequested
    | RunCleanedUp
    | RunStopRequested
    | AggregatorStarted
    | AggregatorExited
    | AggregatorWaits
    | RoundsRestarted
    | RoundWaits
    | rounds.RoundEvent
    | RunCompleted
    | RunFailed
    | AlarmRang
)


@dataclass(frozen=True, slots=True)
class RunFacts:
    """What does not change over a run's life."""

    run: str
    spec: RunSpec
    by: str
    requested_at: datetime
    cause: str = ""
    trace: str = ""

    @property
    def origin(self) -> Origin:
        return Origin(self.run, self.by, self.trace)


@dataclass(frozen=True, slots=True)
class Running:
    """An aggregator works, or is being started. `rounds` outlive it: its successor resumes them.

    `crashes` counts the aggregators that died without any progress in between: an update, a closed round.
    `waits`: what it waits for before it asks anybody. `stopping`: it is to be completed with what it has.
    `escalation`: by how many tiers its aggregator needs a larger machine than the model's size says.
    """

    facts: RunFacts
    attempt: int
    started: bool = False
    rounds: Mapping[int, rounds.Round] = field(default_factory=dict)
    reason: str = ""
    crashes: int = 0
    resumable: bool = True
    waits: str = ""
    life: int = 1
    stopping: bool = False
    escalation: int = 0


@dataclass(frozen=True, slots=True)
class Paused:
    facts: RunFacts
    attempt: int
    rounds: Mapping[int, rounds.Round]
    reason: str
    life: int = 1
    escalation: int = 0


@dataclass(frozen=True, slots=True)
class Ended:
    """`cleaned`: the broker holds no data of the run any more, but for checkpoints if it is `resumable`."""

    facts: RunFacts
    outcome: Literal["completed", "failed", "cancelled"]
    reason: str
    attempt: int
    rounds: Mapping[int, rounds.Round]
    ended_at: datetime
    cleaned: bool = False
    resumable: bool = True
    life: int = 1
    escalation: int = 0


Run = Running | Paused | Ended
Step = tuple[Run, Commands]


TRANSITIONS: tuple[Transition, ...] = (
    Transition(None, "requested", Running),
    Transition(Running, "paused by a person", Paused),
    Transition(Paused, "resumed by a person, as the next attempt", Running),
    Transition(Running, "completed, failed, or cancelled by a person", Ended),
    Transition(Paused, "cancelled by a person, or its last report", Ended),
    Transition(Ended, "failed or cancelled, and resumed by a person from its last checkpoint", Running),
)
"""Every change of state. A state may also follow itself: an aggregator that ended is replaced by the next attempt."""


def step(state: Run | None, event: RunEvent, at: datetime) -> Step:
    """The run after `event`, which happened at `at`; a change of state that is not in `TRANSITIONS` is a bug.

    Raises:
        InvalidTransition: a second request under one id, or a pause that would lose the run's work.
    """
    after, commands = _step(state, event, at)
    check_transition(TRANSITIONS, state, after)
    return after, commands


def _step(state: Run | None, event: RunEvent, at: datetime) -> Step:
    if state is None:
        return _first(event, at)
    if isinstance(event, RunRequested):
        raise InvalidTransition(f"run {event.run} was requested twice")
    if isinstance(state, Ended):
        return _ended(state, event, at)
    if getattr(event, "attempt", state.attempt) != state.attempt:
        return state, ()
    match event:
        case RunStopRequested():
            return _stopping(state)
        case RunCancelRequested(reason=reason):
            return _end(state, "cancelled", reason, at)
        case RunCompleted() | RunFailed():
            return _end(state, *_outcome(event), at)
        case AlarmRang(key=key):
            return _rang(state, key)
        case RoundOpened() | UpdateReceived() | UpdateRefused() | RoundCollected() | RoundAbandoned() | RoundClosed():
            return _round(state, event, at)
        case _:
            return _running(state, event, at) if isinstance(state, Running) else _paused(state, event, at)


def _ended(state: Ended, event: RunEvent, at: datetime) -> Step:
    match event:
        case RunCleanedUp():
            return replace(state, cleaned=True), ()
        case RunResumeRequested() | RunStopRequested():
            if (reason := why_not_kept(state, at)) is not None:
                raise InvalidTransition(f"run {state.facts.run} {reason}")
            closed = {n: r for n, r in state.rounds.items() if isinstance(r, rounds.Closed)}
            again = Running(state.facts, state.attempt + 1, rounds=closed, reason="resumed", life=state.life + 1)
            again = replace(again, stopping=isinstance(event, RunStopRequested), escalation=state.escalation)
            return again, pending_commands(again)
        case _:
            return state, ()


def _stopping(state: Running | Paused) -> Step:
    if isinstance(state, Running):
        if not state.resumable:
            raise InvalidTransition(
                f"run {state.facts.run} cannot be stopped: its app runs its own rounds", "Cancel it"
            )
        after = replace(state, stopping=True)
        return after, (_tell_to_stop(state.facts.run),)
    after = Running(state.facts, state.attempt + 1, rounds=state.rounds, life=state.life, stopping=True)
    after = replace(after, escalation=state.escalation)
    return after, pending_commands(after)


def _tell_to_stop(run: str) -> TellTimeIsUp:
    return TellTimeIsUp(run, 0, 0, "", "deadline", ends_run=True)


def why_not_kept(state: Ended, at: datetime) -> str | None:
    """Why an ended run cannot go on, or None."""
    if state.outcome == "completed":
        return "is completed, which `resume` and `stop` cannot change"
    if not state.resumable:
        return f"is {state.outcome}, and nothing of it was kept: its app runs its own rounds"
    if not is_kept(state, at):
        return f"is {state.outcome} since {state.ended_at:%Y-%m-%d}: checkpoints are kept for {RESUMABLE_FOR.days} days"
    if not state.cleaned:
        return f"is {state.outcome}, and its nodes are being told: try again in a moment"
    return None


def is_kept(state: Run, at: datetime) -> bool:
    """Whether the checkpoints of a run are needed."""
    return not isinstance(state, Ended) or (state.outcome != "completed" and at - state.ended_at < RESUMABLE_FOR)


def has_ended_since(state: Run, moment: datetime) -> bool:
    """Whether the run has not ended, or later than that."""
    return not isinstance(state, Ended) or state.ended_at > moment


def _first(event: RunEvent, at: datetime) -> Step:
    if not isinstance(event, RunRequested):
        name = event.id if isinstance(event, AlarmRang) else event.run
        raise InvalidTransition(f"{event.kind} for a run {name} that was never requested")
    run = Running(RunFacts(event.run, event.spec, event.by, at, event.cause, event.trace), attempt=1)
    return run, pending_commands(run)


def _running(state: Running, event: RunEvent, at: datetime) -> Step:
    match event:
        case RunPauseRequested(reason=reason):
            if not state.resumable:
                raise InvalidTransition(f"run {state.facts.run} cannot be paused: its app cannot resume its rounds")
            paused = Paused(state.facts, state.attempt, state.rounds, reason, state.life, state.escalation)
            return paused, pending_commands(paused)
        case AggregatorStarted():
            return replace(state, started=True, waits=""), ()
        case AggregatorWaits(reason=reason):
            return replace(state, waits=reason), ()
        case AggregatorExited():
            return _crashed(state, event, at)
        case RoundWaits(held=held) if held:
            return replace(state, waits=held), ()
        case RoundWaits(needed=needed, there=there):
            return replace(state, waits=f"the app wants {needed} nodes, its cohort has {there}"), ()
        case RoundsRestarted():
            return replace(state, rounds={}, reason=f"{state.reason}; started again from its first round"), ()
        case _:
            return state, ()


def _round(state: Running | Paused, event: rounds.RoundEvent, at: datetime) -> Step:
    number, before = event.round, state.rounds.get(event.round)
    after = rounds.step(before, event, at)
    check_transition(rounds.TRANSITIONS, before, after)
    known = {**state.rounds, number: after}
    if isinstance(state, Paused):
        return replace(state, rounds=known), ()
    if isinstance(event, RoundOpened):
        state = replace(state, resumable=state.resumable and event.resumable, waits="")
    # What an aggregator reports again after a crash changes nothing: that is no progress.
    progress = isinstance(event, RoundClosed | UpdateReceived) and after != before
    crashes = 0 if progress else state.crashes
    return replace(state, rounds=known, crashes=crashes), _new_commands(state.facts, before, after)


def _rang(state: Running | Paused, key: str) -> Step:
    if isinstance(state, Paused) or not state.rounds:
        return state, ()
    number = max(state.rounds)
    before = state.rounds[number]
    after = rounds.after_alarm(before, key, state.facts.run, state.facts.spec.policy)
    return replace(state, rounds={**state.rounds, number: after}), _new_commands(state.facts, before, after)


def _new_commands(facts: RunFacts, before: rounds.Round | None, after: rounds.Round) -> Commands:
    """The commands that the round needs now and did not need before."""
    policy = facts.spec.policy
    known = rounds.pending_commands(before, facts.run, policy) if before is not None else ()
    return tuple(c for c in rounds.pending_commands(after, facts.run, policy) if c not in known)


def _crashed(state: Running, event: AggregatorExited, at: datetime) -> Step:
    what = f"the aggregator ended with code {event.code}" + (f": {event.reason}" if event.reason else "")
    if event.hopeless:
        return _end(state, "failed", event.reason or what, at)
    crashes = state.crashes + (not event.preempted)
    if crashes >= MAX_CRASHES:
        return _end(state, "failed", f"{what}; this happened {MAX_CRASHES} times without progress", at)
    attempt = state.attempt + 1
    reason = f"{what}; attempt {attempt}"
    escalation = state.escalation + event.out_of_memory
    again = replace(
        state, attempt=attempt, started=False, reason=reason, crashes=crashes, waits="", escalation=escalation
    )
    return again, pending_commands(again)


def _paused(state: Paused, event: RunEvent, at: datetime) -> Step:
    if not isinstance(event, RunResumeRequested):
        return state, ()
    known = {n: rounds.restart_clock(r, at) for n, r in state.rounds.items()}
    again = Running(state.facts, state.attempt + 1, rounds=known, reason="resumed", life=state.life)
    again = replace(again, escalation=state.escalation)
    return again, pending_commands(again)


def _outcome(event: RunCompleted | RunFailed) -> tuple[Literal["completed", "failed"], str]:
    return ("completed", event.note) if isinstance(event, RunCompleted) else ("failed", event.reason)


def _end(
    state: Running | Paused, outcome: Literal["completed", "failed", "cancelled"], reason: str, at: datetime
) -> Step:
    left = {n: rounds.end(r, outcome) for n, r in state.rounds.items()}
    resumable = not isinstance(state, Running) or state.resumable
    ended = Ended(state.facts, outcome, reason, state.attempt, left, at, resumable=resumable, life=state.life)
    ended = replace(ended, escalation=state.escalation)
    return ended, pending_commands(ended)


def pending_commands(state: Run) -> Commands:
    """What this state still wants done: issued on entry, and again after a restart."""
    match state:
        case Running(facts=facts, attempt=attempt):
            trace = str(facts.origin.context)
            launch = LaunchAggregator(facts.run, attempt, facts.spec, state.life, state.escalation, trace)
            if state.stopping:
                return (launch, _tell_to_stop(facts.run))
            if not state.rounds:
                return (launch,)
            return (launch, *rounds.pending_commands(state.rounds[max(state.rounds)], facts.run, facts.spec.policy))
        case Paused(facts=facts):
            return (SuspendAggregator(facts.run),)
        case Ended(cleaned=True):
            return ()
        case Ended(facts=facts, outcome="completed"):
            return (CleanUp(facts.run, state.life),)
        case Ended(facts=facts):
            return (StopAggregator(facts.run, state.life),)


ACTIONS: Mapping[RunActionName, frozenset[type[Run]]] = {
    "cancel": frozenset({Running, Paused, Ended}),
    "pause": frozenset({Running, Paused}),
    "resume": frozenset({Paused, Ended}),
    "stop": frozenset({Running, Paused, Ended}),
}
"""The states in which each action is allowed. Cancelling an ended run and pausing a paused one change nothing."""


def why_not_allowed(state: Run, action: RunActionName, at: datetime) -> str | None:
    """Why a person may not do this now, or None."""
    if isinstance(state, Ended) and action in ("resume", "stop"):
        return why_not_kept(state, at)
    if type(state) not in ACTIONS[action]:
        is_now = state.outcome if isinstance(state, Ended) else "running"
        return f"is {is_now}, which `{action}` cannot change"
    if action == "pause" and isinstance(state, Running) and not state.resumable:
        return "cannot be paused: its app cannot resume its rounds, they would be lost"
    if action == "stop" and isinstance(state, Running) and not state.resumable:
        return "cannot be stopped so that it keeps what it has: its app runs its own rounds; `run cancel` ends it"
    return None


def is_done(state: Run, action: RunActionName) -> bool:
    """Whether the action would change nothing."""
    return (action == "cancel" and isinstance(state, Ended)) or (action == "pause" and isinstance(state, Paused))


def is_current(state: Run, attempt: int) -> bool:
    """Whether an aggregator of this attempt is still wanted."""
    return isinstance(state, Running) and state.attempt == attempt


def awaited(state: Run) -> frozenset[str]:
    """Nodes that have a task of this run now."""
    if not isinstance(state, Running) or not state.rounds:
        return frozenset()
    last = state.rounds[max(state.rounds)]
    if not isinstance(last, rounds.Open | rounds.Collecting):
        return frozenset()
    return last.phases[last.phase].awaited if last.phase in last.phases else frozenset()


def participants(state: Run) -> frozenset[str]:
    """Nodes with at least one accepted training update."""
    tallies = [r.phases["train"] for r in state.rounds.values() if "train" in r.phases]
    return frozenset().union(*(t.received for t in tallies))


def accepted_updates(state: Run) -> int:
    return sum(len(r.phases["train"].received) for r in state.rounds.values() if "train" in r.phases)
