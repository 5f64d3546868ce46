"""The event log's vocabulary: everything that happened, as versioned CloudEvents.

Events are inputs: what a person asked for, what a node or aggregator reported, an alarm that
rang. What follows from them is decided by the coordinator's reducers, the same on every replay.
Envelope: CloudEvents 1.0, structured JSON (https://github.com/cloudevents/spec/blob/v1.0.2).
"""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError

from fedtide.fabric.errors import MalformedMessage
from fedtide.fabric.events.costs import BudgetApplied, BudgetRemoved, PricesApplied, UsageReported
from fedtide.fabric.events.identity import (
    JoinTokenCreated,
    JoinTokenRevoked,
    LogBegun,
    LogRestored,
    NodeEnrolled,
    NodeQuarantined,
    NodeRemoved,
    NodeRevoked,
    OrderRefused,
    RegionIssued,
    RegionRemoved,
    TrustPublished,
    TrustVouched,
)
from fedtide.fabric.events.people import ServiceTokenCreated, ServiceTokenRevoked
from fedtide.fabric.events.rollouts import (
    NodeMeasured,
    NodePhaseReported,
    QueryAnswered,
    RegionCached,
    RegionCacheFailed,
    RolloutAbortRequested,
    RolloutNextRequested,
    RolloutPauseRequested,
    RolloutPromoteRequested,
    RolloutResumeRequested,
    RolloutRetryRequested,
    RolloutRollbackRequested,
    RolloutSettled,
    RolloutStarted,
)
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
    RunRemoved,
    RunRequested,
    RunResumeRequested,
    RunStopRequested,
    UpdateReceived,
    UpdateRefused,
)
from fedtide.fabric.events.tenants import QuotaSet, TenantAdded, TenantChanged, TenantForgotten, TenantRemoved
from fedtide.fabric.ids import new_event_id
from fedtide.fabric.messages.heartbeat import Capabilities
from fedtide.fabric.plans.release import Export, Privacy, ReleaseManifest
from fedtide.fabric.plans.trigger_rule import Signal, TriggerRule
from fedtide.fabric.strict import Tagged, TaggedMessage
from fedtide.fabric.tensors.blobs import BlobRef
from fedtide.fabric.validation import first_problem

TYPE_PREFIX = "dev.fedtide."
TYPE_VERSION = ".v1"


class NodeJoined(TaggedMessage):
    """A node's agent started, or its capabilities changed."""

    kind: Literal["node.joined"] = "node.joined"
    node: str
    region: str
    capabilities: Capabilities


class NodeOnline(TaggedMessage):
    kind: Literal["node.online"] = "node.online"
    node: str


class NodeOffline(TaggedMessage):
    kind: Literal["node.offline"] = "node.offline"
    node: str
    reason: str


class ModelProduced(TaggedMessage):
    """A run exported its global model; the registry makes a release of it."""

    kind: Literal["model.produced"] = "model.produced"
    run: str
    model: str
    onnx: BlobRef
    parts: list[BlobRef] = Field(default=[], description="As `ReleaseManifest.parts`")
    arrays: BlobRef
    smoke: BlobRef
    export: Export
    metrics: dict[str, float]
    base: BlobRef | None = None
    privacy: Privacy | None = None
    signature: str = Field(default="", max_length=200, description="Of the run's aggregator (fabric.trust.claims)")
    mandate: str = Field(default="", max_length=4000, description="What lets that aggregator speak for the run")


class DriftReported(TaggedMessage):
    """What a region's nodes see differs from what their model was trained on."""

    kind: Literal["drift.reported"] = "drift.reported"
    region: str
    node: str = Field(default="", description="Who reports: a node, or a collector for its region")
    model: str
    feature: str = ""
    score: float = Field(description="Population stability index, or whatever `method` says")
    method: str = "psi"
    samples: int = Field(default=0, ge=0)


class CoordinatorElected(TaggedMessage):
    """Another coordinator leads from here on; the previous leader can append no more."""

    kind: Literal["coordinator.elected"] = "coordinator.elected"
    name: str
    url: str = ""


class ReleasePublished(TaggedMessage):
    kind: Literal["release.published"] = "release.published"
    release: BlobRef
    manifest: ReleaseManifest
    attestation: BlobRef | None = Field(default=None, description="Its provenance, signed; None: nobody has signed it")


class ReleaseAttested(TaggedMessage):
    """A release that was published before it was signed is signed now."""

    kind: Literal["release.attested"] = "release.attested"
    model: str
    release: BlobRef
    attestation: BlobRef


class AlarmRang(TaggedMessage):
    """The time of an alarm has come; `key` names the alarm of its owner."""

    kind: Literal["alarm.rang"] = "alarm.rang"
    owner: Literal["rollout", "run"]
    id: str
    key: str


class TriggerApplied(TaggedMessage):
    """A rule is new, or was changed; a changed rule keeps its counters and history."""

    kind: Literal["trigger.applied"] = "trigger.applied"
    rule: TriggerRule


class TriggerRemoved(TaggedMessage):
    kind: Literal["trigger.removed"] = "trigger.removed"
    name: str


class FiringFailed(TaggedMessage):
    """What a rule should start cannot be started: no such model, no node with its labels, ..."""

    kind: Literal["trigger.firing_failed"] = "trigger.firing_failed"
    rule: str
    id: str
    reason: str


class NotificationSent(TaggedMessage):
    """What a rule had to tell is told."""

    kind: Literal["notification.sent"] = "notification.sent"
    rule: str
    id: str


class SignalReceived(TaggedMessage):
    """An event from outside: a webhook, a schedule, a person."""

    kind: Literal["signal.received"] = "signal.received"
    signal: Signal


class UnknownEvent(TaggedMessage):
    """An event of a newer version. It changes nothing here; one that must be understood is refused instead."""

    kind: Literal["unknown"] = "unknown"
    named: str


class UnreadableEvent(TaggedMessage):
    """What stands at a place of the log that is no event. It is never written there."""

    kind: Literal["unreadable"] = "unreadable"
    sequence: int
    reason: str


EventData = Annotated[
    UnknownEvent
    | UnreadableEvent
    | NodeJoined
    | NodeOnline
    | NodeOffline
    | RunRequested
    | RunPauseRequested
    | RunRemoved
    | RunResumeRequested
    | RunStopRequested
    | RunCancelRequested
    | RunCleanedUp
    | AggregatorStarted
    | AggregatorWaits
    | AggregatorExited
    | RoundsRestarted
    | RoundOpened
    | UpdateReceived
    | UpdateRefused
    | RoundCollected
    | RoundWaits
    | RoundAbandoned
    | RoundClosed
    | ModelProduced
    | RunCompleted
    | RunFailed
    | ReleasePublished
    | ReleaseAttested
    | RolloutStarted
    | RolloutAbortRequested
    | RolloutRollbackRequested
    | RolloutPauseRequested
    | RolloutResumeRequested
    | RolloutPromoteRequested
    | RolloutNextRequested
    | RolloutRetryRequested
    | QueryAnswered
    | RegionCached
    | RegionCacheFailed
    | RolloutSettled
    | NodeMeasured
    | NodePhaseReported
    | AlarmRang
    | TriggerApplied
    | TriggerRemoved
    | FiringFailed
    | NotificationSent
    | SignalReceived
    | DriftReported
    | CoordinatorElected
    | JoinTokenCreated
    | JoinTokenRevoked
    | NodeEnrolled
    | NodeRevoked
    | NodeRemoved
    | LogBegun
    | LogRestored
    | RegionRemoved
    | RegionIssued
    | TrustPublished
    | TrustVouched
    | OrderRefused
    | NodeQuarantined
    | ServiceTokenCreated
    | ServiceTokenRevoked
    | TenantAdded
    | TenantChanged
    | TenantRemoved
    | TenantForgotten
    | QuotaSet
    | UsageReported
    | PricesApplied
    | BudgetApplied
    | BudgetRemoved,
    Field(discriminator="kind"),
]


class Event(Tagged):
    """One CloudEvent. `id` is unique for ever: the log stores an id once."""

    TAG = "specversion"

    specversion: Literal["1.0"] = "1.0"
    id: str
    source: str
    type: str
    time: datetime
    datacontenttype: Literal["application/json"] = "application/json"
    decided: str = Field(default="", description="What was decided when it was logged (coordinator.decisions)")
    data: EventData

    @classmethod
    def now(cls, source: str, data: EventData, *, id: str | None = None) -> Event:
        """Wrap `data` with the clock of this process; a given `id` makes the event idempotent."""
        return cls(
            id=id or new_event_id(),
            source=source,
            type=f"{TYPE_PREFIX}{data.kind}{TYPE_VERSION}",
            time=datetime.now(UTC),
            data=data,
        )


def decode_event(raw: bytes) -> Event:
    """An event, also of a kind that only a newer version knows (`UnknownEvent`).

    Raises:
        MalformedMessage: `raw` is no event, or an unknown one that must be understood.
    """
    try:
        event = Event.model_validate_json(raw, extra="ignore")
    except ValidationError as exc:
        if any(e["type"] == "union_tag_invalid" and e["loc"] == ("data",) for e in exc.errors(include_url=False)):
            return _unknown(json.loads(raw))
        raise MalformedMessage(f"event: {first_problem(exc)}") from exc
    if event.type != f"{TYPE_PREFIX}{event.data.kind}{TYPE_VERSION}":
        raise MalformedMessage(f"event type {event.type!r} does not name its data ({event.data.kind})")
    return event


def _unknown(event: dict[str, Any]) -> Event:
    data = event["data"]
    kind = str(data.get("kind"))
    if data.get("must_understand"):
        raise MalformedMessage(f"event: {kind!r} must be understood, and this version does not know it", "Upgrade it")
    try:
        return Event.model_validate({**event, "data": {"kind": "unknown", "named": kind}}, extra="ignore")
    except ValidationError as exc:
        raise MalformedMessage(f"event: {first_problem(exc)}") from exc
