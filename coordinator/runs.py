"""A run: one federated job from request to end.

    (none) --RunRequested--> Running(attempt 1) --RunCompleted--> Ended(completed)
                               |    ^      \\--RunFailed--> Ended(failed)
                               |    |--AggregatorExited: attempt + 1 resumes the rounds, up to MAX_ATTEMPTS
                               \\--RunCancelRequested--> Ended(cancelled)

Pure. Reports of an attempt that is not the current one change nothing: its process was given up.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Literal

from coordinator import rounds
from coordinator.commands import CleanUp, Commands, LaunchAggregator, StopAggregator
from fabric.errors import InvalidTransition
from fabric.events import (
    AggregatorExited,
    AggregatorStarted,
    RoundClosed,
    RoundOpened,
    RoundsRestarted,
    RunCancelRequested,
    RunCompleted,
    RunFailed,
    RunRequested,
    RunSpec,
    UpdateReceived,
    UpdateRefused,
)

MAX_ATTEMPTS = 5

RunEvent = (
    RunRequested
    | RunCancelRequested
    | AggregatorStarted
    | AggregatorExited
    | RoundsRestarted
    | RoundOpened
    | UpdateReceived
    | UpdateRefused
    | RoundClosed
    | RunCompleted
    | RunFailed
)


@dataclass(frozen=True, slots=True)
class Facts:
    """What does not change over a run's life."""

    run: str
    spec: RunSpec
    by: str
    requested_at: datetime


@dataclass(frozen=True, slots=True)
class Running:
    """An aggregator works, or is being started. `rounds` outlive it: its successor resumes them."""

    facts: Facts
    attempt: int
    started: bool = False
    rounds: Mapping[int, rounds.Round] = field(default_factory=dict)
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Ended:
    facts: Facts
    outcome: Literal["completed", "failed", "cancelled"]
    reason: str
    attempt: int
    rounds: Mapping[int, rounds.Round]
    ended_at: datetime


Run = Running | Ended
Step = tuple[Run, Commands]


def step(state: Run | None, event: RunEvent, at: datetime) -> Step:
    """The run after `event`, which happened at `at`.

    Raises:
        InvalidTransition: a second request under one id.
    """
    if state is None:
        return _first(event, at)
    if isinstance(event, RunRequested):
        raise InvalidTransition(f"run {event.run} was requested twice")
    if isinstance(state, Ended):
        return state, ()
    return _running(state, event, at)


def _first(event: RunEvent, at: datetime) -> Step:
    if not isinstance(event, RunRequested):
        raise InvalidTransition(f"{event.kind} for a run {event.run} that was never requested")
    run = Running(Facts(event.run, event.spec, event.by, at), attempt=1)
    return run, owed(run)


def _running(state: Running, event: RunEvent, at: datetime) -> Step:
    match event:
        case RunCancelRequested(reason=reason):
            ended = _end(state, "cancelled", reason, at)
            return ended, owed(ended)
        case _ if getattr(event, "attempt", state.attempt) != state.attempt:
            return state, ()
        case AggregatorStarted():
            return replace(state, started=True), ()
        case AggregatorExited():
            return _crashed(state, event, at)
        case RoundsRestarted():
            return replace(state, rounds={}, reason=f"{state.reason}; started again from its first round"), ()
        case RunCompleted(note=note):
            return _end(state, "completed", note, at), (CleanUp(state.facts.run),)
        case RunFailed(reason=reason):
            return _end(state, "failed", reason, at), (CleanUp(state.facts.run),)
        case RoundOpened() | UpdateReceived() | UpdateRefused() | RoundClosed():
            number = event.round
            return replace(state, rounds={**state.rounds, number: rounds.step(state.rounds.get(number), event)}), ()
        case _:
            raise InvalidTransition(f"{event.kind} while run {state.facts.run} is running")


def _crashed(state: Running, event: AggregatorExited, at: datetime) -> Step:
    what = f"the aggregator ended with code {event.code}" + (f": {event.reason}" if event.reason else "")
    if state.attempt >= MAX_ATTEMPTS:
        return _end(state, "failed", f"{what}; {MAX_ATTEMPTS} attempts were made", at), (CleanUp(state.facts.run),)
    again = replace(state, attempt=state.attempt + 1, started=False, reason=f"{what}; attempt {state.attempt + 1}")
    return again, owed(again)


def _end(state: Running, outcome: Literal["completed", "failed", "cancelled"], reason: str, at: datetime) -> Ended:
    left = {n: rounds.abandon(r, f"the run {outcome}") for n, r in state.rounds.items()}
    return Ended(state.facts, outcome, reason, state.attempt, left, at)


def owed(state: Run) -> Commands:
    """What this state still wants done: issued on entry, and again after a restart."""
    match state:
        case Running(facts=facts, attempt=attempt):
            return (LaunchAggregator(facts.run, attempt, facts.spec),)
        case Ended(facts=facts, outcome="cancelled"):
            return (StopAggregator(facts.run),)
        case Ended():
            return ()


def is_current(state: Run, attempt: int) -> bool:
    """Whether an aggregator of this attempt is still wanted."""
    return isinstance(state, Running) and state.attempt == attempt


def participants(state: Run) -> frozenset[str]:
    """Nodes with at least one accepted training update."""
    tallies = [r.phases["train"] for r in state.rounds.values() if "train" in r.phases]
    return frozenset().union(*(t.received for t in tallies))


def accepted_updates(state: Run) -> int:
    return sum(len(r.phases["train"].received) for r in state.rounds.values() if "train" in r.phases)
