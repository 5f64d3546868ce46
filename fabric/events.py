"""The event log's vocabulary: everything that happened, as versioned CloudEvents.

Events are inputs: what a person asked for, what a node or aggregator reported, an alarm that
rang. What follows from them is decided by the coordinator's reducers, the same on every replay.
Envelope: CloudEvents 1.0, structured JSON (https://github.com/cloudevents/spec/blob/v1.0.2).
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated, Literal

from pydantic import Field, ValidationError

from fabric.blobs import BlobRef
from fabric.errors import MalformedMessage
from fabric.ids import new_id
from fabric.release import Export, ReleaseManifest
from fabric.rollout_plan import NodePhase, RolloutPlan
from fabric.trigger_rule import Signal, TriggerRule
from fabric.wire import AppRef, ConfigValues, Strict

TYPE_PREFIX = "dev.fedtide."
TYPE_VERSION = ".v1"


class Capabilities(Strict):
    """What a node can do; it says so at every start and when it changes."""

    labels: dict[str, str] = {}
    cpus: int = Field(ge=1)
    memory_bytes: int = Field(ge=0)
    disk_free_bytes: int = Field(ge=0)
    python: str
    extras: list[str] = Field(default=[], description="Training runtimes present: flwr, torch, ...")
    samples: int | None = Field(default=None, ge=0, description="Training samples the node counts, if configured")
    node_config: ConfigValues = {}
    inference_url: str = ""
    agent_version: str = ""


class NodeJoined(Strict):
    """A node's agent started, or its capabilities changed."""

    kind: Literal["node.joined"] = "node.joined"
    node: str
    region: str
    capabilities: Capabilities


class NodeOnline(Strict):
    kind: Literal["node.online"] = "node.online"
    node: str


class NodeOffline(Strict):
    kind: Literal["node.offline"] = "node.offline"
    node: str
    reason: str


class RunSpec(Strict):
    """What a run is: an app at a digest, where it runs, and for how long."""

    app: AppRef
    model: str | None = Field(default=None, description="Registry name of the result, or None: no release is made")
    rounds: int | None = Field(default=None, ge=1, description="None: as the app says")
    run_config: ConfigValues = {}
    selector: dict[str, str] = Field(default={}, description="Labels a node must have; `region` counts as one")
    base: BlobRef | None = Field(default=None, description="The release manifest to start from")
    round_timeout_s: float = Field(default=3600.0, gt=0)


class RunRequested(Strict):
    kind: Literal["run.requested"] = "run.requested"
    run: str
    spec: RunSpec
    by: str = Field(default="cli", description="Who or what asked")


class RunCancelRequested(Strict):
    kind: Literal["run.cancel_requested"] = "run.cancel_requested"
    run: str
    reason: str = "asked by a person"


class AggregatorStarted(Strict):
    """An aggregator process took the run; attempts count from 1."""

    kind: Literal["run.aggregator_started"] = "run.aggregator_started"
    run: str
    attempt: int


class AggregatorExited(Strict):
    kind: Literal["run.aggregator_exited"] = "run.aggregator_exited"
    run: str
    attempt: int
    code: int
    reason: str = ""


class RoundsRestarted(Strict):
    """An app whose rounds are its own (no `Strategy.start`) begins again after a crash."""

    kind: Literal["run.rounds_restarted"] = "run.rounds_restarted"
    run: str
    attempt: int


class RoundOpened(Strict):
    """Tasks of one kind went out for a round; a round has a train and perhaps an evaluate phase."""

    kind: Literal["round.opened"] = "round.opened"
    run: str
    attempt: int
    round: int
    phase: str
    nodes: list[str]
    bytes_down: int


class UpdateReceived(Strict):
    """An answer that was accepted. (run, attempt, round, phase, node) is its identity."""

    kind: Literal["round.update_received"] = "round.update_received"
    run: str
    attempt: int
    round: int
    phase: str
    node: str
    bytes_up: int
    seconds: float


class UpdateRefused(Strict):
    """An answer, or the lack of one, that does not count; `reason` says why."""

    kind: Literal["round.update_refused"] = "round.update_refused"
    run: str
    attempt: int
    round: int
    phase: str
    node: str
    category: Literal["app_error", "node_lost", "timeout", "late", "wrong_shape", "not_finite", "malformed"]
    reason: str


class RoundClosed(Strict):
    kind: Literal["round.closed"] = "round.closed"
    run: str
    attempt: int
    round: int
    metrics: dict[str, float]
    seconds: float


class ModelProduced(Strict):
    """A run exported its global model; the registry makes a release of it."""

    kind: Literal["model.produced"] = "model.produced"
    run: str
    model: str
    onnx: BlobRef
    arrays: BlobRef
    smoke: BlobRef
    export: Export
    metrics: dict[str, float]
    base: BlobRef | None = None


class RunCompleted(Strict):
    kind: Literal["run.completed"] = "run.completed"
    run: str
    attempt: int
    note: str = ""


class RunFailed(Strict):
    """The app itself failed: another attempt would fail the same way."""

    kind: Literal["run.failed"] = "run.failed"
    run: str
    attempt: int
    reason: str


class ReleasePublished(Strict):
    kind: Literal["release.published"] = "release.published"
    release: BlobRef
    manifest: ReleaseManifest


class RolloutStarted(Strict):
    """`counter` is the desired-state counter of this roll-out; `counter + 1` is kept for its roll-back."""

    kind: Literal["rollout.started"] = "rollout.started"
    rollout: str
    plan: RolloutPlan
    counter: int
    by: str = "cli"


class RolloutAbortRequested(Strict):
    kind: Literal["rollout.abort_requested"] = "rollout.abort_requested"
    rollout: str
    reason: str = "asked by a person"


class NodePhaseReported(Strict):
    """Where a node is with one desired state."""

    kind: Literal["rollout.node_phase"] = "rollout.node_phase"
    rollout: str
    node: str
    counter: int
    phase: NodePhase
    reason: str = ""


class AlarmRang(Strict):
    """A deadline passed; `key` is what set it."""

    kind: Literal["alarm.rang"] = "alarm.rang"
    owner: Literal["rollout", "run"]
    id: str
    key: str


class TriggerApplied(Strict):
    """A rule is new, or changed (its books go on)."""

    kind: Literal["trigger.applied"] = "trigger.applied"
    rule: TriggerRule


class TriggerRemoved(Strict):
    kind: Literal["trigger.removed"] = "trigger.removed"
    name: str


class FiringFailed(Strict):
    """What a rule says cannot be started: no such model, no node with its labels, ..."""

    kind: Literal["trigger.firing_failed"] = "trigger.firing_failed"
    rule: str
    id: str
    reason: str


class SignalReceived(Strict):
    """An event from outside: a webhook, a schedule, a person."""

    kind: Literal["signal.received"] = "signal.received"
    signal: Signal


EventData = Annotated[
    NodeJoined
    | NodeOnline
    | NodeOffline
    | RunRequested
    | RunCancelRequested
    | AggregatorStarted
    | AggregatorExited
    | RoundsRestarted
    | RoundOpened
    | UpdateReceived
    | UpdateRefused
    | RoundClosed
    | ModelProduced
    | RunCompleted
    | RunFailed
    | ReleasePublished
    | RolloutStarted
    | RolloutAbortRequested
    | NodePhaseReported
    | AlarmRang
    | TriggerApplied
    | TriggerRemoved
    | FiringFailed
    | SignalReceived,
    Field(discriminator="kind"),
]


class Event(Strict):
    """One CloudEvent. `id` is unique for ever: the log stores an id once."""

    specversion: Literal["1.0"] = "1.0"
    id: str
    source: str
    type: str
    time: datetime
    datacontenttype: Literal["application/json"] = "application/json"
    data: EventData

    @classmethod
    def now(cls, source: str, data: EventData, *, id: str | None = None) -> Event:
        """Wrap `data` with the clock of this process; a given `id` makes the event idempotent."""
        return cls(
            id=id or new_id("evt"),
            source=source,
            type=f"{TYPE_PREFIX}{data.kind}{TYPE_VERSION}",
            time=datetime.now(UTC),
            data=data,
        )


def decode_event(raw: bytes) -> Event:
    """Raises MalformedMessage unless `raw` is an event of a known type and version."""
    try:
        event = Event.model_validate_json(raw)
    except ValidationError as exc:
        first = exc.errors()[0]
        raise MalformedMessage(f"event: {'.'.join(map(str, first['loc']))}: {first['msg']}") from exc
    if event.type != f"{TYPE_PREFIX}{event.data.kind}{TYPE_VERSION}":
        raise MalformedMessage(f"event type {event.type!r} does not name its data ({event.data.kind})")
    return event
