"""What reducers ask the executor to do. Every command may be carried out twice without harm."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal

from fedtide.fabric.events.envelope import ModelProduced
from fedtide.fabric.plans.rollout_plan import Terms
from fedtide.fabric.plans.round_policy import Cause
from fedtide.fabric.plans.run_spec import RunSpec
from fedtide.fabric.plans.trigger_rule import Signal, TriggerRule
from fedtide.fabric.tensors.blobs import BlobRef

_NO_TERMS = Terms()


@dataclass(frozen=True, slots=True)
class LaunchAggregator:
    """`life`, `escalation`: as the run's. `trace`: the run's span."""

    run: str
    attempt: int
    spec: RunSpec
    life: int = 1
    escalation: int = 0
    trace: str = ""


@dataclass(frozen=True, slots=True)
class StopAggregator:
    """End the run's aggregator if it is there, tell its nodes to stop, and clean up; its checkpoints are kept."""

    run: str
    life: int = 1


@dataclass(frozen=True, slots=True)
class SuspendAggregator:
    """End the run's aggregator if it is there; its tasks and checkpoints stay for the next attempt."""

    run: str


@dataclass(frozen=True, slots=True)
class TellTimeIsUp:
    """A round's alarm has rung: its aggregator waits no longer. Stored, so that the next attempt reads it too."""

    run: str
    round: int
    trial: int
    phase: str
    cause: Cause
    ends_run: bool = False


@dataclass(frozen=True, slots=True)
class CleanUp:
    """The run is completed: its checkpoints, consumer and left-over replies are deleted. Ends in `RunCleanedUp`."""

    run: str
    life: int = 1


@dataclass(frozen=True, slots=True)
class PublishRelease:
    """Make a release of what a run produced; ends in `ReleasePublished`."""

    produced: ModelProduced
    version: int


@dataclass(frozen=True, slots=True)
class SetDesired:
    """Tell one node what to serve; the node acts on the highest counter only."""

    node: str
    model: str
    counter: int
    rollout: str
    release: BlobRef | None
    expires_at: datetime | None = None
    terms: Terms = _NO_TERMS


@dataclass(frozen=True, slots=True)
class SettleNodes:
    """Tell nodes of a roll-out that is over what they keep; ends in `RolloutSettled`."""

    rollout: str
    nodes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class CacheRelease:
    """Bring a release to a region's leaf, once over the link; ends in `RegionCached`."""

    rollout: str
    region: str
    counter: int
    release: BlobRef
    bytes_per_s: int | None


@dataclass(frozen=True, slots=True)
class CancelRun:
    """End a run that trains from a release that was rolled back."""

    run: str
    reason: str


@dataclass(frozen=True, slots=True)
class SetAlarm:
    """Ends in `AlarmRang` at `due`, also across a restart of the coordinator."""

    owner: Literal["rollout", "run"]
    id: str
    key: str
    due: datetime


@dataclass(frozen=True, slots=True)
class AnnouncePresence:
    """Tell running aggregators that a node came or went."""

    node: str
    state: str


@dataclass(frozen=True, slots=True)
class PublishAccount:
    """Tell every server which keys are withdrawn now."""


@dataclass(frozen=True, slots=True)
class Fire:
    """Start what a trigger rule says, under exactly this id; a second time changes nothing."""

    rule: TriggerRule
    id: str
    cause: str
    signal: Signal
    trace: str = ""


@dataclass(frozen=True, slots=True)
class StopFired:
    """End a run or roll-out that a rule started before: a newer firing replaces it."""

    rule: str
    id: str


RunCommand = LaunchAggregator | StopAggregator | SuspendAggregator | TellTimeIsUp | CleanUp
RolloutCommand = SetDesired | SettleNodes | CacheRelease | CancelRun
Command = RunCommand | RolloutCommand | PublishRelease | SetAlarm | AnnouncePresence | PublishAccount | Fire | StopFired
Commands = tuple[Command, ...]


def subject_of(command: Command) -> str:
    """What a command is about: commands of one subject are carried out in their order."""
    return _SUBJECTS[type(command)](command)


def _of_run(command: RunCommand | CancelRun) -> str:
    return f"run/{command.run}"


_SUBJECTS: Mapping[type, Callable[[Any], str]] = {
    AnnouncePresence: lambda c: f"node/{c.node}",
    CacheRelease: lambda c: f"cache/{c.region}/{c.rollout}",
    CancelRun: _of_run,
    CleanUp: _of_run,
    Fire: lambda c: f"rule/{c.rule.name}",
    LaunchAggregator: _of_run,
    PublishAccount: lambda _: "account",
    PublishRelease: lambda c: f"model/{c.produced.model}",
    SetAlarm: lambda c: f"alarm/{c.owner}/{c.id}",
    SetDesired: lambda c: f"node/{c.node}/{c.model}",
    SettleNodes: lambda c: f"settle/{c.rollout}",
    StopAggregator: _of_run,
    StopFired: lambda c: f"rule/{c.rule}",
    SuspendAggregator: _of_run,
    TellTimeIsUp: _of_run,
}
