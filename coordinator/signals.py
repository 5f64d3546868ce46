"""What an event of the log means to trigger rules: its type and flat fields. Pure.

| type | when | fields |
|---|---|---|
| (any) | an event came from outside | what it carried |
| dev.fedtide.release.published | a release is in the registry | model, version, metric_<name> |
| dev.fedtide.rollout.completed / .rolledback | a roll-out ended | model, version, rollout |
| dev.fedtide.run.ended | a run ended | run, model, outcome |
| dev.fedtide.fleet.changed | a node came or went | node, region, online (nodes of all), region_online |
| dev.fedtide.data.reported | a node told its sample count | node, region, samples, region_samples, fleet_samples |
| dev.fedtide.schedule.<rule> | the rule's own schedule | - |
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from coordinator import rollouts, runs
from fabric.events import (
    TYPE_PREFIX,
    Event,
    NodeJoined,
    NodeOffline,
    NodeOnline,
    NodePhaseReported,
    ReleasePublished,
    RolloutAbortRequested,
    RunCancelRequested,
    RunCompleted,
    RunFailed,
    SignalReceived,
)
from fabric.trigger_rule import Field_, Signal

if TYPE_CHECKING:
    from coordinator.world import World


def of(event: Event, world: World) -> Iterator[Signal]:
    """The signals of an event that was just applied to `world`."""
    match event.data:
        case SignalReceived(signal=signal):
            yield signal
        case ReleasePublished(manifest=manifest):
            metrics = {f"metric_{k}": v for k, v in manifest.metrics.items()}
            yield _signal(event, "release.published", model=manifest.model, version=manifest.version, **metrics)
        case NodePhaseReported(rollout=key) | RolloutAbortRequested(rollout=key):
            yield from _rollout_ended(event, key, world)
        case RunCompleted(run=key) | RunFailed(run=key) | RunCancelRequested(run=key):
            run = world.runs[key]
            if isinstance(run, runs.Ended) and run.ended_at == event.time:
                model = run.facts.spec.model or ""
                yield _signal(event, "run.ended", run=key, model=model, outcome=run.outcome)
        case NodeJoined(node=name) | NodeOnline(node=name) | NodeOffline(node=name):
            yield from _fleet_changed(event, name, world)
        case _:
            return


def _rollout_ended(event: Event, key: str, world: World) -> Iterator[Signal]:
    state = world.rollouts[key]
    if not isinstance(state, rollouts.Completed | rollouts.RolledBack):
        return
    name = f"rollout.{type(state).__name__.lower()}"
    plan = state.facts.plan
    # One end, one signal: later reports of the same roll-out carry the same id, and rules fire once an id.
    signal = _signal(event, name, model=plan.model, version=plan.version, rollout=key)
    yield signal.model_copy(update={"id": f"{key}.{name}"})


def _fleet_changed(event: Event, name: str, world: World) -> Iterator[Signal]:
    node = world.nodes[name]
    online = [n for n in world.nodes.values() if n.online]
    here = sum(n.region == node.region for n in online)
    yield _signal(event, "fleet.changed", node=name, region=node.region, online=len(online), region_online=here)
    if isinstance(event.data, NodeJoined) and node.capabilities.samples is not None:
        told = [(n.region, n.capabilities.samples or 0) for n in world.nodes.values()]
        yield _signal(
            event,
            "data.reported",
            node=name,
            region=node.region,
            samples=node.capabilities.samples,
            region_samples=sum(s for region, s in told if region == node.region),
            fleet_samples=sum(s for _, s in told),
        )


def _signal(event: Event, name: str, **fields: Field_) -> Signal:
    return Signal(id=event.id, type=f"{TYPE_PREFIX}{name}", fields=fields)
