"""Spans of what has happened, from the events of the log. Pure.

A trace begins with the rule that fired, or the person who asked, and ends on the nodes:

    trigger NAME
      run RUN
        round N
          train | evaluate | ...                one phase, from the tasks until no answer is waited for
            answer NODE                         from its task to its answer; refused: an error, with the reason
              work NODE                         what the node says that it took
        publish MODEL                           from the export until the registry has the release
        trigger NAME
          roll-out ROLLOUT
            cache REGION
            node NODE                           from its offer; the phases are events of the span

Ids are derived from names (`fedtide.fabric.trace_context`). Of what was under way when this process began to lead,
runs, rounds, phases and roll-outs begin when the state says; an answer begins with its end.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta

from fedtide.coordinator.rollouts import rollouts, waves
from fedtide.coordinator.runs import rounds, runs
from fedtide.coordinator.state import World
from fedtide.fabric.events.envelope import Event, ModelProduced, ReleasePublished
from fedtide.fabric.events.rollouts import NodePhaseReported, RegionCached, RegionCacheFailed, RolloutStarted
from fedtide.fabric.events.runs import (
    RoundAbandoned,
    RoundClosed,
    RoundCollected,
    RoundOpened,
    RunRequested,
    UpdateReceived,
    UpdateRefused,
)
from fedtide.fabric.trace_context import Origin, TraceContext, of_answer, of_offer

Value = str | int | float | bool
MOST_MOMENTS = 64
"""Of one span: a node may repeat itself."""
MOST_OPEN = 100_000
"""Beginnings that are remembered; of more, the oldest are forgotten."""


@dataclass(frozen=True, slots=True)
class Moment:
    """An event within a span."""

    at: datetime
    name: str
    about: Mapping[str, Value] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Span:
    """`failed`: why; empty: it did not."""

    name: str
    context: TraceContext
    parent: TraceContext | None
    began: datetime
    ended: datetime
    about: Mapping[str, Value] = field(default_factory=dict)
    moments: tuple[Moment, ...] = ()
    links: tuple[TraceContext, ...] = ()
    failed: str = ""


class Spans:
    """Told every event that was applied, in order, it gives the spans that have ended with it."""

    def __init__(self) -> None:
        self._began: dict[TraceContext, datetime] = {}
        self._moments: dict[TraceContext, tuple[Moment, ...]] = {}

    def go_on(self, world: World) -> None:
        """What is under way already began when the world says."""
        for run in world.runs.values():
            if not isinstance(run, runs.Ended):
                context = run.facts.origin.context
                self._begin(context, run.facts.requested_at)
                for number, state in run.rounds.items():
                    for phase, tally in state.phases.items() if not isinstance(state, rounds.Closed) else ():
                        if tally.opened_at is not None:
                            self._begin(_round(context, number), tally.opened_at)
                            self._begin(_phase(context, number, state.trial, phase), tally.opened_at)
        for rollout in world.rollouts.values():
            if rollouts.is_open(rollout):
                self._begin(rollout.facts.origin.context, rollout.facts.started_at)

    def of(self, event: Event, world: World) -> Iterator[Span]:
        """The spans that end with an event; `world` is that after it, or later."""
        data, at = event.data, event.time
        match data:
            case RunRequested():
                yield from self._firing(Origin(data.run, data.by, data.trace), at, world)
            case RolloutStarted():
                yield from self._firing(Origin(data.rollout, data.by, data.trace), at, world)
            case _ if (run := world.runs.get(getattr(data, "run", ""))) is not None:
                yield from self._of_run(event, run)
            case ReleasePublished():
                yield from self._released(data, at, world)
            case _ if (rollout := world.rollouts.get(getattr(data, "rollout", ""))) is not None:
                yield from self._of_rollout(event, rollout, world)

    def _firing(self, origin: Origin, at: datetime, world: World) -> Iterator[Span]:
        self._begin(origin.context, at)
        if origin.firing is None:
            return
        name = origin.by.removeprefix("trigger ")
        rule = world.triggers.get(name)
        record = next((r for r in reversed(rule.history if rule else ()) if r.started == origin.key), None)
        about = {"fedtide.trigger": name}
        about |= {"fedtide.event": record.signal, "fedtide.type": record.type} if record else {}
        yield Span(f"trigger {name}", origin.firing, origin.parent, record.at if record else at, at, about)

    def _of_run(self, event: Event, run: runs.Run) -> Iterator[Span]:
        data, at, span = event.data, event.time, run.facts.origin.context
        about: dict[str, Value]
        match data:
            case RoundOpened():
                self._begin(_round(span, data.round), at)
                self._begin(_phase(span, data.round, data.trial, data.phase), at)
                for node in data.nodes:
                    self._begin(of_answer(span, data.round, data.trial, data.phase, node), at)
            case UpdateReceived() | UpdateRefused():
                yield from self._answered(data, at, span)
            case RoundCollected():
                context = _phase(span, data.round, data.trial, data.phase)
                about = {"fedtide.updates": data.received, "fedtide.cause": data.cause}
                yield self._end(data.phase, context, _round(span, data.round), at, about)
            case RoundClosed():
                about = {f"fedtide.metric.{name}": value for name, value in data.metrics.items()}
                yield self._end(f"round {data.round}", _round(span, data.round), span, at, about)
            case RoundAbandoned():
                moment = Moment(at, "abandoned", {"reason": data.reason, "trial": data.trial})
                self._add(_round(span, data.round), moment)
            case ModelProduced():
                self._begin(span.child("publish"), at)
        if isinstance(run, runs.Ended) and span in self._began:
            facts = run.facts
            about = {"fedtide.run": facts.run, "fedtide.app": facts.spec.app.name, "fedtide.outcome": run.outcome}
            about |= {"fedtide.model": facts.spec.model} if facts.spec.model else {}
            about |= {"fedtide.by": facts.by}
            origin = facts.origin
            failed = run.reason or run.outcome if run.outcome != "completed" else ""
            yield self._end(f"run {facts.run}", span, origin.firing or origin.parent, run.ended_at, about, failed)

    def _answered(self, data: UpdateReceived | UpdateRefused, at: datetime, span: TraceContext) -> Iterator[Span]:
        context = of_answer(span, data.round, data.trial, data.phase, data.node)
        about: dict[str, Value] = {"fedtide.node": data.node, "fedtide.bytes_up": data.bytes_up}
        about["fedtide.cpu_seconds"] = data.usage.cpu_us / 1e6
        failed = ""
        if isinstance(data, UpdateRefused):
            failed = f"{data.category}: {data.reason}"
        else:
            about["fedtide.staleness"] = data.staleness
            began = at - timedelta(seconds=data.seconds)
            yield Span(f"work {data.node}", context.child("work"), context, began, at, {"fedtide.node": data.node})
        phase = _phase(span, data.round, data.trial, data.phase)
        yield self._end(f"answer {data.node}", context, phase, at, about, failed)

    def _released(self, data: ReleasePublished, at: datetime, world: World) -> Iterator[Span]:
        run = world.runs.get(data.manifest.lineage.run)
        if run is not None:
            span, manifest = run.facts.origin.context, data.manifest
            about: dict[str, Value] = {"fedtide.model": manifest.model, "fedtide.version": manifest.version}
            about["fedtide.release"] = data.release.digest
            yield self._end(f"publish {manifest.model}", span.child("publish"), span, at, about)

    def _of_rollout(self, event: Event, rollout: rollouts.Rollout, world: World) -> Iterator[Span]:
        data, at, span = event.data, event.time, rollout.facts.origin.context
        about: dict[str, Value]
        match data:
            case NodePhaseReported():
                yield from self._on_node(data, at, rollout)
            case RegionCached() | RegionCacheFailed():
                about = {"fedtide.region": data.region}
                about |= {"fedtide.wan_bytes": data.wan_bytes} if isinstance(data, RegionCached) else {}
                failed = data.reason if isinstance(data, RegionCacheFailed) else ""
                began = rollout.facts.started_at
                name, context = f"cache {data.region}", span.child("cache", data.region)
                yield Span(name, context, span, began, at, about, failed=failed)
        if not rollouts.is_open(rollout) and span in self._began:
            facts, state = rollout.facts, rollouts.state_name(rollout)
            about = {"fedtide.rollout": facts.rollout, "fedtide.model": facts.plan.model, "fedtide.outcome": state}
            about |= {"fedtide.version": facts.plan.version, "fedtide.by": facts.by}
            failed = rollout.reason if isinstance(rollout, rollouts.RolledBack) else ""
            above = facts.origin.firing or facts.origin.parent
            whole = self._end(f"roll-out {facts.rollout}", span, above, at, about, failed)
            yield replace(whole, links=_producer(rollout, world))

    def _on_node(self, data: NodePhaseReported, at: datetime, rollout: rollouts.Rollout) -> Iterator[Span]:
        above = rollout.facts.origin.context
        context = of_offer(above, data.node, data.counter)
        self._begin(context, at)
        self._add(context, Moment(at, data.phase, {"reason": data.reason} if data.reason else {}))
        if data.phase not in waves.ENDED:
            return
        known = rollouts.nodes_of(rollout).get(data.node)
        is_offer = known is not None and known.counter == data.counter
        about: dict[str, Value] = {"fedtide.node": data.node, "fedtide.wan_bytes": data.wan_bytes}
        about["fedtide.goes_back"] = data.counter > rollout.facts.counter
        failed = f"{data.phase}: {data.reason}" if data.phase in waves.FAILED else ""
        span = self._end(f"node {data.node}", context, above, at, about, failed)
        yield replace(span, began=min(known.offered_at, at)) if is_offer and known is not None else span

    def _begin(self, context: TraceContext, at: datetime) -> None:
        self._began.setdefault(context, at)
        while len(self._began) > MOST_OPEN:
            oldest = next(iter(self._began))
            del self._began[oldest]
            self._moments.pop(oldest, None)

    def _add(self, context: TraceContext, moment: Moment) -> None:
        known = self._moments.get(context, ())
        if context in self._began and len(known) < MOST_MOMENTS:
            self._moments[context] = (*known, moment)

    def _end(
        self,
        name: str,
        context: TraceContext,
        parent: TraceContext | None,
        at: datetime,
        about: Mapping[str, Value],
        failed: str = "",
    ) -> Span:
        moments = self._moments.pop(context, ())
        return Span(name, context, parent, self._began.pop(context, at), at, about, moments, (), failed)


def _round(run: TraceContext, number: int) -> TraceContext:
    return run.child("round", number)


def _phase(run: TraceContext, number: int, trial: int, phase: str) -> TraceContext:
    return run.child("phase", number, trial, phase)


def _producer(rollout: rollouts.Rollout, world: World) -> tuple[TraceContext, ...]:
    """The run whose release it is, if that is another trace."""
    plan = rollout.facts.plan
    model = world.models.get(plan.model)
    release = next((r for r in model.releases if r.ref == plan.release), None) if model is not None else None
    run = world.runs.get(release.manifest.lineage.run) if release is not None else None
    context = run.facts.origin.context if run is not None else None
    return (context,) if context is not None and context.trace != rollout.facts.origin.context.trace else ()
