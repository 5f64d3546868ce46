"""Short ways to say what happens in a scenario."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

from fedtide.coordinator import reducers
from fedtide.coordinator.commands import CacheRelease, SetAlarm
from fedtide.coordinator.state import World
from fedtide.fabric.events.envelope import AlarmRang, Event, EventData, ModelProduced, NodeJoined, ReleasePublished
from fedtide.fabric.events.rollouts import NodeMeasured, NodePhaseReported, RegionCached, RolloutStarted
from fedtide.fabric.events.runs import (
    RoundAbandoned,
    RoundClosed,
    RoundCollected,
    RoundOpened,
    RunRequested,
    UpdateReceived,
    UpdateRefused,
)
from fedtide.fabric.messages.heartbeat import Capabilities
from fedtide.fabric.plans.release import Export, Lineage, ReleaseManifest
from fedtide.fabric.plans.rollout_plan import Measured, NodePhase, RolloutPlan, WavePlan
from fedtide.fabric.plans.run_spec import AppRef, RunSpec
from fedtide.fabric.tensors.blobs import BlobRef


def decide(world: World, event: Event) -> tuple[Event, tuple[Any, ...]]:
    """Fold one event into `world`, whole or not at all, as the engine does; else as `reducers.step`."""
    draft = world.draft()
    decided = reducers.step(draft, event)
    draft.commit()
    return decided


def apply(world: World, event: Event) -> tuple[Any, ...]:
    """As `decide`, of an event that is in the log."""
    return decide(world, event)[1]


START = datetime(2026, 1, 1, tzinfo=UTC)


def ref(letter: str) -> BlobRef:
    return BlobRef(digest=letter * 64, size_bytes=10)


APP = AppRef(name="app", bundle=ref("a"))


class Story:
    """Feeds events into a world, a second apart, and keeps them for a replay."""

    def __init__(self) -> None:
        self.world = World()
        self.events: list[Event] = []
        self.decided: list[Event] = []
        """The same as the log has them, with what was decided."""

    def tell(self, *data: EventData, after_s: float = 1.0, caches: bool = True) -> tuple[Any, ...]:
        """The commands of the last event. Regions fetch a release at once, unless `caches` is false."""
        commands: tuple[Any, ...] = ()
        for each in data:
            event = self.event(each, after_s)
            logged, commands = decide(self.world, event)
            self.events.append(event)
            self.decided.append(logged)
            for asked in [c for c in commands if isinstance(c, CacheRelease) and caches]:
                commands += self.tell(cached(asked.region, asked.rollout), after_s=0)
        return commands

    def ring(self, rollout: str = "ro-1") -> tuple[Any, ...]:
        """The alarm that the roll-out waits for, at its time."""
        (wanted,) = [c for c in self.pending_commands() if isinstance(c, SetAlarm) and c.id == rollout]
        seconds = (wanted.due - self.events[-1].time).total_seconds()
        return self.tell(AlarmRang(owner="rollout", id=rollout, key=wanted.key), after_s=max(0.0, seconds))

    def event(self, data: EventData, after_s: float = 1.0) -> Event:
        at = (self.events[-1].time if self.events else START) + timedelta(seconds=after_s)
        return Event.now("test", data).model_copy(update={"time": at})

    def replayed(self) -> World:
        world = World()
        for event in self.events:
            apply(world, event)
        return world

    def pending_commands(self) -> list[Any]:
        return [command for commands in self.world.pending_commands() for command in commands]


def requested(run: str = "run-1", **spec: Any) -> RunRequested:
    return RunRequested(run=run, spec=RunSpec(app=APP, **spec))


def opened(
    number: int, *nodes: str, attempt: int = 1, phase: str = "train", run: str = "run-1", **more: Any
) -> RoundOpened:
    body = {"run": run, "attempt": attempt, "round": number, "phase": phase, "nodes": list(nodes), "bytes_down": 10}
    return RoundOpened.model_validate({**body, **more})


def received(number: int, node: str, attempt: int = 1, phase: str = "train", **more: Any) -> UpdateReceived:
    body = {"run": "run-1", "attempt": attempt, "round": number, "phase": phase, "node": node}
    return UpdateReceived.model_validate({**body, "bytes_up": 5, "seconds": 1, **more})


def collected(number: int, cause: str = "all answered", attempt: int = 1, **more: Any) -> RoundCollected:
    body = {"run": "run-1", "attempt": attempt, "round": number, "phase": "train", "received": 1, "cause": cause}
    return RoundCollected.model_validate({**body, **more})


def abandoned(number: int, trial: int = 1, reason: str = "too few") -> RoundAbandoned:
    return RoundAbandoned(run="run-1", attempt=1, round=number, trial=trial, reason=reason)


def refused(number: int, node: str, category: str = "app_error", attempt: int = 1, **more: Any) -> UpdateRefused:
    body = {"run": "run-1", "attempt": attempt, "round": number, "phase": "train", "node": node, **more}
    return UpdateRefused.model_validate({**body, "category": category, "reason": "because"})


def closed(number: int, attempt: int = 1, **metrics: float) -> RoundClosed:
    return RoundClosed(run="run-1", attempt=attempt, round=number, metrics=metrics, seconds=2.0)


def joined(node: str, region: str = "eu", **capabilities: Any) -> NodeJoined:
    known = Capabilities(cpus=1, memory_bytes=1, disk_free_bytes=1, python="3.11", **capabilities)
    return NodeJoined(node=node, region=region, capabilities=known)


def produced(run: str = "run-1") -> ModelProduced:
    return ModelProduced(
        run=run, model="m", onnx=ref("b"), arrays=ref("c"), smoke=ref("d"), export=Export(), metrics={}
    )


def published(run: str = "run-1", version: int = 1, digest: str = "e") -> ReleasePublished:
    lineage = Lineage(app=APP, run=run, rounds=1, participants=1, updates=1)
    manifest = ReleaseManifest(
        model="m", version=version, onnx=ref("b"), arrays=ref("c"), smoke=ref("d"), lineage=lineage
    )
    return ReleasePublished(release=ref(digest), manifest=manifest)


def rollout(*waves: WavePlan, key: str = "ro-1", counter: int = 1, **plan: Any) -> RolloutStarted:
    one_by_one = [w if w.group else w.model_copy(update={"group": i}) for i, w in enumerate(waves)]
    planned = RolloutPlan.model_validate({"model": "m", "release": ref("e"), "version": 1, "waves": one_by_one, **plan})
    return RolloutStarted(rollout=key, plan=planned, counter=counter)


def wave(region: str, canaries: str = "", nodes: str = "") -> WavePlan:
    return WavePlan(region=region, canaries=canaries.split(), nodes=nodes.split())


def cached(region: str, key: str = "ro-1", wan_bytes: int = 10) -> RegionCached:
    return RegionCached(rollout=key, region=region, wan_bytes=wan_bytes)


def measured(node: str, counter: int = 1, key: str = "ro-1", **counts: Any) -> NodeMeasured:
    return NodeMeasured(rollout=key, node=node, counter=counter, measured=Measured(**counts))


def phase(node: str, name: NodePhase, reason: str = "", counter: int = 1, key: str = "ro-1") -> NodePhaseReported:
    return NodePhaseReported(rollout=key, node=node, counter=counter, phase=name, reason=reason)


def run_alarm(key: str, run: str = "run-1") -> AlarmRang:
    return AlarmRang(owner="run", id=run, key=key)
