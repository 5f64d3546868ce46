"""Runs and their rounds as the API shows them. Pure."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping

from fedtide.coordinator.fleet import fleet
from fedtide.coordinator.runs import rounds, runs
from fedtide.fabric.messages.heartbeat import Heartbeat
from fedtide.fabric.messages.views import PhaseView, RefusalView, RoundState, RoundView, RunState, RunView

Doing = Callable[[str], str]
"""What a node is doing for a run: queued, downloading, training, offline."""


def doing(run: str, node: fleet.Node | None, heartbeat: Heartbeat | None) -> str:
    """What an awaited node is doing, by its last heartbeat."""
    if node is None or not node.online:
        return "offline"
    works_for_run = heartbeat is not None and (heartbeat.busy or "").startswith(f"{run}-")
    return heartbeat.stage if heartbeat is not None and works_for_run else "queued"


def run(
    state: runs.Run,
    *,
    publishing: bool,
    version: int | None,
    matching: Callable[[], int],
    doing: Doing,
    rounds_too: bool = True,
) -> RunView:
    """A run with its rounds.

    Args:
        publishing: the model that it produced is not a release yet, so the view does not call the run completed.
        version: of the release that the run produced.
        matching: counts the nodes that are online and that its selector matches; only asked if that is shown.
        doing: what an awaited node is doing for this run.
    """
    facts = state.facts
    seconds = (state.ended_at - facts.requested_at).total_seconds() if isinstance(state, runs.Ended) else None
    return RunView(
        run=facts.run,
        app=facts.spec.app.name,
        model=facts.spec.model,
        state=run_state(state, publishing=publishing),
        reason=_waiting(state, matching) or state.reason,
        version=version,
        by=facts.by,
        attempt=state.attempt,
        requested_at=facts.requested_at,
        selector=facts.spec.selector,
        participants=sorted(runs.participants(state)) if rounds_too else [],
        rounds=[_round(r, doing) for _, r in sorted(state.rounds.items())] if rounds_too else [],
        seconds=None if seconds is None else round(seconds, 3),
    )


def _waiting(state: runs.Run, matching: Callable[[], int]) -> str:
    if not isinstance(state, runs.Running):
        return ""
    if state.waits or not state.started:
        return state.waits
    if any(number or each.phases for number, each in state.rounds.items()):  # in round 0 only a custom main asks
        return ""
    return f"no round yet; {matching()} matching nodes are online (the app may wait for more)"


def run_state(state: runs.Run, *, publishing: bool) -> RunState:
    """The state as views name it."""
    if isinstance(state, runs.Ended):
        return "publishing" if publishing else state.outcome
    if isinstance(state, runs.Paused):
        return "paused"
    return "running" if state.started else "starting"


def round_state(state: rounds.Round) -> RoundState:
    """The state as views name it."""
    match state:
        case rounds.Open():
            return "open"
        case rounds.Collecting():
            return "collecting"
        case rounds.Aggregating():
            return "aggregating"
        case rounds.Closed():
            return "closed"
        case rounds.Abandoned():
            return "abandoned"


def _round(state: rounds.Round, doing: Doing) -> RoundView:
    is_open = isinstance(state, rounds.Open | rounds.Collecting)
    return RoundView(
        round=state.number,
        trial=state.trial,
        state=round_state(state),
        reason=_round_reason(state),
        abandoned=list(state.before),
        phases={name: _phase(t, doing if is_open else None) for name, t in state.phases.items()},
        metrics=finite(state.metrics) if isinstance(state, rounds.Closed) else {},
        seconds=round(state.seconds, 3) if isinstance(state, rounds.Closed) else None,
        bytes_up=sum(t.bytes_up for t in state.phases.values()),
        bytes_down=sum(t.bytes_down for t in state.phases.values()),
    )


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


def finite(metrics: Mapping[str, float]) -> dict[str, float | None]:
    """The same with None for NaN and infinity, which JSON does not have."""
    return {name: value if math.isfinite(value) else None for name, value in metrics.items()}


def _phase(tally: rounds.Tally, doing: Doing | None) -> PhaseView:
    states = Counter(answered=len(tally.received), refused=len(tally.refused))
    states.update(doing(n) if doing is not None else "awaited" for n in tally.awaited)
    return PhaseView(
        asked=len(tally.asked),
        states={name: count for name, count in states.items() if count},
        received=sorted(tally.received),
        awaited=sorted(tally.awaited),
        stale=sorted(tally.stale),
        quorum=tally.quorum,
        cause=tally.cause,
        refused={n: RefusalView(category=r.category, reason=r.reason) for n, r in sorted(tally.refused.items())},
    )
