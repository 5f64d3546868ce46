"""Which events led to the present state of a run, a round or a node, each as a sentence. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from fedtide.coordinator.rollouts import views as rollout_views
from fedtide.coordinator.runs import rounds, runs, selection
from fedtide.coordinator.state import World
from fedtide.fabric.errors import NotFound
from fedtide.fabric.events.envelope import AlarmRang, Event, NodeJoined, NodeOffline, NodeOnline
from fedtide.fabric.events.rollouts import NodeMeasured, NodePhaseReported
from fedtide.fabric.events.runs import (
    AggregatorExited,
    AggregatorStarted,
    RoundAbandoned,
    RoundClosed,
    RoundCollected,
    RoundOpened,
    RoundsRestarted,
    RunCancelRequested,
    RunCompleted,
    RunFailed,
    RunPauseRequested,
    RunRequested,
    RunResumeRequested,
    UpdateReceived,
    UpdateRefused,
)


@dataclass(frozen=True, slots=True)
class Because:
    """One step on the way to the present state; `event` is its id in the log."""

    at: str
    event: str
    what: str


def present(world: World, name: str, number: int | None) -> list[str]:
    """The present state of a run, one of its rounds, or a node: the reason first.

    Raises:
        NotFound: there is no such run, round or node.
    """
    if name in world.runs:
        run = world.runs[name]
        return list(_run(world, run) if number is None else _round(world, run, number))
    if name in world.nodes and number is None:
        return list(_node(world, name))
    near = ", ".join([*list(world.runs)[-4:], *sorted(world.nodes)[:4]]) or "none yet"
    raise NotFound(f"there is no run or node {name!r}", f"Known: {near}. A round is RUN/NUMBER")


def _run(world: World, run: runs.Run) -> Iterator[str]:
    match run:
        case runs.Ended(outcome=outcome, reason=reason):
            yield f"{outcome}: {reason or 'every round is closed'}"
        case runs.Paused(reason=reason):
            yield f"paused: {reason}"
        case runs.Running(attempt=attempt, reason=reason):
            yield f"running, attempt {attempt}" + (f": {reason}" if reason else "")
            yield from list(_round(world, run, max(run.rounds)))[:1] if run.rounds else []
    yield f"started by {run.facts.by}" + (f", because of {run.facts.cause}" if run.facts.cause else "")
    rule = world.triggers.get(run.facts.by.removeprefix("trigger "))
    if rule is not None and run.facts.by.startswith("trigger "):
        yield f"the rule fires on {rule.rule.type}" + (f" where {rule.rule.where}" if rule.rule.where else "")


def _round(world: World, run: runs.Run, number: int) -> Iterator[str]:
    state = run.rounds.get(number)
    if state is None:
        raise NotFound(f"run {run.facts.run} has no round {number}", f"It has: {sorted(run.rounds)}")
    yield f"round {number}, trial {state.trial}: {type(state).__name__.lower()}" + _detail(state)
    yield from (f"an earlier trial was abandoned: {why}" for why in state.before)
    asked = state.phases["train"].asked if "train" in state.phases else frozenset()
    for phase, tally in state.phases.items():
        for node in sorted(tally.awaited):
            yield f"{phase}: waits for {node}"
        for node, refused in sorted(tally.refused.items()):
            yield f"{phase}: {node} does not count, {refused.category}: {refused.reason}"
    for node in sorted(set(world.nodes) - asked):
        why = selection.why_not(world.nodes[node], run.facts.spec)
        yield f"{node} was not asked" + (f" (now: {why})" if why else "")


def _detail(state: rounds.Round) -> str:
    match state:
        case rounds.Abandoned(reason=reason):
            return f", {reason}"
        case rounds.Closed(phases=phases) if "train" in phases and phases["train"].cause:
            return f", {phases['train'].cause}"
        case rounds.Open() | rounds.Collecting() | rounds.Aggregating():
            tally = state.phases.get(state.phase, rounds.Tally())
            rung = f", its alarm has rung: {tally.rang}" if tally.rang else ""
            return f", {state.phase}: {len(tally.received)} of {len(tally.asked)} answered{rung}"
        case _:
            return ""


def _node(world: World, name: str) -> Iterator[str]:
    node = world.nodes[name]
    yield f"online since {node.since:%Y-%m-%d %H:%M:%S}" if node.online else f"offline: {node.reason}"
    for key, run in world.active_runs():
        if name in runs.awaited(run):
            yield f"has a task of {key}"
    for model, serving in sorted(world.serving.items()):
        if name in serving:
            yield f"serves release {serving[name].digest[:12]} of {model}"
    for rollout in world.rollouts.values():
        if line := rollout_views.why(rollout, name):
            yield line


def history(events: Iterable[Event], name: str, number: int | None) -> list[Because]:
    """The events that name a run, round or node, as sentences; those that say nothing new are left out."""
    steps = []
    for event in events:
        sentence = _sentence(event) if _is_about(event, name, number) else None
        if sentence is not None:
            steps.append(Because(event.time.isoformat(timespec="milliseconds"), event.id, sentence))
    return steps


def _is_about(event: Event, name: str, number: int | None) -> bool:
    data = event.data
    if isinstance(data, AlarmRang):
        return data.id == name and (number is None or data.key.startswith(f"{number}."))
    if name not in (getattr(data, "run", None), getattr(data, "node", None)):
        return False
    return number is None or getattr(data, "round", None) == number


def _sentence(event: Event) -> str | None:
    match event.data:
        case RunRequested(by=by, cause=cause):
            return f"requested by {by}" + (f", because of {cause}" if cause else "")
        case RunPauseRequested(reason=reason) | RunCancelRequested(reason=reason):
            return f"{event.data.kind.removeprefix('run.').removesuffix('_requested')} {reason}"
        case RunResumeRequested():
            return "resumed"
        case AggregatorStarted(attempt=attempt):
            return f"an aggregator took it, attempt {attempt}"
        case AggregatorExited(attempt=attempt, code=code, reason=reason):
            return f"the aggregator of attempt {attempt} ended with code {code}" + (f": {reason}" if reason else "")
        case RoundsRestarted():
            return "its app began again from the first round"
        case RunCompleted(note=note):
            return "completed" + (f": {note}" if note else "")
        case RunFailed(reason=reason):
            return f"failed: {reason}"
        case AlarmRang(key=key):
            return f"alarm {key} rang"
        case _:
            return _round_sentence(event) or _node_sentence(event)


def _round_sentence(event: Event) -> str | None:
    match event.data:
        case RoundOpened(round=number, trial=trial, phase=phase, nodes=nodes):
            return f"round {number}, trial {trial}: {phase} asked of {', '.join(nodes)}"
        case UpdateReceived(round=number, phase=phase, node=node):
            return f"round {number}: {phase} of {node} counts"
        case UpdateRefused(round=number, phase=phase, node=node, category=category, reason=reason):
            return f"round {number}: {phase} of {node} does not count, {category}: {reason}"
        case RoundCollected(round=number, phase=phase, received=received, cause=cause):
            return f"round {number}: {phase} ended with {received} answers, {cause}"
        case RoundAbandoned(round=number, trial=trial, reason=reason):
            return f"round {number}, trial {trial} abandoned: {reason}"
        case RoundClosed(round=number):
            return f"round {number} closed"
        case _:
            return None


def _node_sentence(event: Event) -> str | None:
    match event.data:
        case NodeJoined():
            return "its agent started"
        case NodeOnline():
            return "it was heard of again"
        case NodeOffline(reason=reason):
            return f"went offline: {reason}"
        case NodeMeasured(rollout=rollout, measured=measured):
            told = ", ".join(f"{k} {v:g}" for k, v in measured.model_dump().items() if v)
            return f"{rollout}: measured {told}" if told else None
        case NodePhaseReported(rollout=rollout, phase=phase, reason=reason):
            return f"{rollout}: {phase}" + (f", {reason}" if reason else "")
        case _:
            return None
