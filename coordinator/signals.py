"""What an event of the log means to trigger rules: its type and flat fields. Pure.

| type | when | fields |
|---|---|---|
| (any) | an event came from outside | what it carried |
| dev.fedtide.release.published | - | model, version, metric_<name>, traceparent, also current_version, ... |
| dev.fedtide.rollout.completed / .rolledback | a roll-out ended | model, version, rollout, reason |
| dev.fedtide.rollout.paused | a roll-out is paused | model, version, rollout, reason |
| dev.fedtide.run.ended | a run ended | run, model, outcome, reason |
| dev.fedtide.fleet.changed | a node came or went | node, here (is it online?), region, online (of all), region_online |
| dev.fedtide.data.reported | a node told its sample count | node, region, samples, region_samples, fleet_samples |
| dev.fedtide.drift.reported | a region or node reports drift | region, node, model, feature, score, method, samples |
| dev.fedtide.budget.reached | a threshold of a budget | budget, kind (actual, forecast), share, amount, limit |
| dev.fedtide.cost.anomaly | an hour cost much more than usual | dimension, value, hour, amount, usual |
| dev.fedtide.schedule.<rule> | the rule's own schedule | - |
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from fedtide.coordinator.fleet.fleet import Node
from fedtide.coordinator.models.registry import Release
from fedtide.coordinator.rollouts import rollouts
from fedtide.coordinator.runs import runs
from fedtide.fabric.events.envelope import (
    TYPE_PREFIX,
    DriftReported,
    Event,
    NodeJoined,
    NodeOffline,
    NodeOnline,
    ReleasePublished,
    SignalReceived,
)
from fedtide.fabric.plans.trigger_rule import FieldValue, Signal
from fedtide.fabric.trace_context import TRACEPARENT


def of(
    event: Event,
    nodes: Mapping[str, Node],
    current: Callable[[str], Release | None],
    run_of: Callable[[str], runs.Run | None],
) -> Iterator[Signal]:
    """The signals of an event that was just applied.

    Args:
        nodes: those of the fleet now.
        current: which release of a model is being rolled out, or else which most nodes serve.
        run_of: a run by its id, if it is known.
    """
    match event.data:
        case SignalReceived(signal=signal):
            yield signal
        case ReleasePublished(manifest=manifest):
            release = current(manifest.model)
            before = release.manifest if release is not None else None
            fields = {f"metric_{k}": v for k, v in manifest.metrics.items()}
            fields |= {f"current_metric_{k}": v for k, v in before.metrics.items()} if before is not None else {}
            versions = {"version": manifest.version, "current_version": before.version if before is not None else 0}
            producer = run_of(manifest.lineage.run)
            of_run: dict[str, FieldValue] = {}
            if producer is not None:
                of_run[TRACEPARENT] = str(producer.facts.origin.context)
            yield _signal(event, "release.published", model=manifest.model, **versions, **fields, **of_run)
        case DriftReported(region=region, node=node, model=model, feature=feature, score=score):
            where: dict[str, FieldValue] = {"region": region, "node": node, "model": model, "feature": feature}
            how: dict[str, FieldValue] = {"method": event.data.method, "samples": event.data.samples}
            yield _signal(event, "drift.reported", score=score, **where, **how)
        case NodeJoined(node=name) | NodeOnline(node=name) | NodeOffline(node=name):
            yield from _fleet_changed(event, name, nodes)
        case _:
            return


def of_end(event: Event, state: runs.Run | rollouts.Rollout) -> Iterator[Signal]:
    """The signal of a run or roll-out that this event has ended, or a roll-out that it has paused."""
    match state:
        case runs.Ended(facts=facts, outcome=outcome):
            about: dict[str, FieldValue] = {"run": facts.run, "model": facts.spec.model or ""}
            yield _signal(event, "run.ended", outcome=outcome, reason=state.reason, **about)
        case rollouts.Completed() | rollouts.RolledBack() | rollouts.Paused():
            plan, name = state.facts.plan, f"rollout.{type(state).__name__.lower()}"
            reason = "" if isinstance(state, rollouts.Completed) else state.reason
            about = {"model": plan.model, "version": plan.version, "rollout": state.facts.rollout}
            yield _signal(event, name, reason=reason, **about)
        case _:
            return


def _fleet_changed(event: Event, name: str, nodes: Mapping[str, Node]) -> Iterator[Signal]:
    node = nodes[name]
    online = [n for n in nodes.values() if n.online]
    here = sum(n.region == node.region for n in online)
    about: dict[str, FieldValue] = {"node": name, "here": node.online, "region": node.region}
    yield _signal(event, "fleet.changed", online=len(online), region_online=here, **about)
    if isinstance(event.data, NodeJoined) and node.capabilities.samples is not None:
        counted = [(n.region, n.capabilities.samples or 0) for n in nodes.values()]
        yield _signal(
            event,
            "data.reported",
            node=name,
            region=node.region,
            samples=node.capabilities.samples,
            region_samples=sum(s for region, s in counted if region == node.region),
            fleet_samples=sum(s for _, s in counted),
        )


def _signal(event: Event, name: str, **fields: FieldValue) -> Signal:
    return Signal(id=event.id, type=f"{TYPE_PREFIX}{name}", fields=fields)


def signal(event: Event, name: str, which: str, **fields: FieldValue) -> Signal:
    """One of several signals of one event, told apart by `which`."""
    return Signal(id=f"{event.id}.{which}"[:200], type=f"{TYPE_PREFIX}{name}", fields=fields)
