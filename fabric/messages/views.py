"""What the API answers: the public contract, for CLI, operator, notebooks and tests. Pure data.

A reader of another version ignores fields that it does not know; times are UTC, sizes bytes, durations seconds.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any, Generic, Literal, TypeVar

from pydantic import Field

from fedtide.fabric.messages.trust import TrustMetadata
from fedtide.fabric.plans.release import Lineage
from fedtide.fabric.plans.rollout_plan import Gate, Measured, NodePhase, OnFailure
from fedtide.fabric.plans.trigger_rule import Signal, TriggerRule
from fedtide.fabric.strict import ConfigValues, Strict

T = TypeVar("T")


class Problem(Strict):
    """Why a request was refused (RFC 9457 problem details); `exit_code`: for a command that gets this answer."""

    type: str = "about:blank"
    title: str
    status: int
    detail: str
    remedy: str = Field(default="", description="What to do next")
    exit_code: int = 1


class Page(Strict, Generic[T]):
    """Part of a listing. `after` of the next request is `next`; empty: this was the last page."""

    items: list[T]
    total: int = Field(ge=0, description="Items that match, on all pages")
    next: str = ""


class NodeCounts(Strict):
    online: int
    known: int


class RunCounts(Strict):
    active: int
    all: int


class StatusView(Strict):
    """What an installation holds."""

    events: int
    refused_events: int
    nodes: NodeCounts
    regions: list[str]
    runs: RunCounts
    models: int
    rollouts: int
    waits_for: str = Field(default="", description="What the event log waits for: a broker that is full or away")
    warnings: list[str] = Field(default=[], description="What a person should know: stores that fill up")


class StreamView(Strict):
    """How full one stream is."""

    region: str = Field(description="Or `hub`")
    stream: str
    messages: int
    size_bytes: int
    max_bytes: int = Field(description="0: no limit")
    largest: dict[str, int] = Field(
        default={}, description="Nodes with the most messages, if the stream is nearly full"
    )


class StorageView(Strict):
    """How full hub and regions are."""

    streams: list[StreamView]
    warnings: list[str]


class GarbageView(Strict):
    """Messages that nobody needs."""

    region: str
    stream: str
    what: str = Field(description="Their subjects")
    messages: int
    reason: str


class GarbageViews(Strict):
    """What was deleted, or with `dry_run` would be."""

    dry_run: bool
    items: list[GarbageView]


NodeState = Literal["online", "offline"]


class NodeView(Strict):
    name: str
    region: str
    state: NodeState
    reason: str
    since: datetime
    labels: dict[str, str]
    cpus: int
    memory_bytes: int
    disk_free_bytes: int
    extras: list[str]
    samples: int | None
    node_config: ConfigValues
    inference_url: str
    agent_version: str
    python: str = ""
    sandbox: str = Field(default="", description="What apps are kept in there; empty: not told")
    hardware: str = ""
    rss_bytes: int | None = None
    trainer_rss_bytes: int | None = None
    busy: str | None = None
    serving: dict[str, str] = {}
    inferences: int | None = None
    clock_ahead_s: float | None = None
    warnings: list[str] = []
    refused: dict[str, int] = Field(default={}, description="What it did not follow, by why")
    quarantined: str = Field(default="", description="Why it is not asked to train; empty: it is")


class DelegationView(Strict):
    """To whom something is delegated."""

    role: str
    keys: list[str] = Field(description="Their ids")
    threshold: int = Field(description="How many of them must sign")
    paths: list[str] = Field(description="What they may sign: orders/REGION/NODE, apps/APP, releases/MODEL/VERSION")


class TrustView(Strict):
    """Who may say what in this installation."""

    metadata: TrustMetadata
    pin: str = Field(description="VERSION:SHA256 of the newest root, as join tokens name it")
    root_expires: datetime
    targets_expires: datetime
    roles: list[DelegationView]


class AttestationView(Strict):
    """A release's manifest as it is stored, and what is said of it: signed, or to be signed."""

    model: str
    version: int
    manifest: str
    envelope: str = Field(description="DSSE envelope of an in-toto statement, JSON")
    signed: bool
    trust: TrustMetadata = Field(description="The metadata by which the signatures are judged")


class LineageNode(Strict):
    model: str
    version: int
    run: str
    rounds: int
    updates: int
    participants: int
    signed: bool


class LineageView(Strict):
    """What a release was made from, the nearest first, and what was made from it."""

    release: LineageNode
    ancestors: list[LineageNode]
    descendants: list[LineageNode]
    served_by: list[str]


class ContributionView(Strict):
    """Rounds of a run in which an update of the node counts."""

    run: str
    model: str
    rounds: list[int]


class InfluencedView(Strict):
    model: str
    version: int
    through: str = Field(description="The run that counted its update, or the release that it began from")


class ServedView(Strict):
    node: str
    model: str
    version: int


class ProposalView(Strict):
    """How a model goes on without a node's updates."""

    model: str
    roll_back_to: int | None = Field(description="The newest release without them; None: there is none")
    roll_back: list[str] = Field(description="Commands; none: no node serves what has them")
    retrain_from: str = Field(description="RUN/ROUND or version; empty: from the beginning")
    retrain: str = Field(description="A command")


class InfluenceView(Strict):
    """What a node's updates have influenced."""

    node: str
    contributions: list[ContributionView]
    releases: list[InfluencedView]
    served: list[ServedView] = Field(description="Nodes that serve such a release now")
    proposals: list[ProposalView]


class RefusalView(Strict):
    category: str
    reason: str


class PhaseView(Strict):
    """One phase (train, evaluate, ...) of a round."""

    asked: int
    states: dict[str, int] = Field(description="How many nodes do what: answered, refused, training, ...")
    received: list[str]
    awaited: list[str]
    stale: list[str]
    quorum: int | None
    cause: str | None
    refused: dict[str, RefusalView]


RoundState = Literal["open", "collecting", "aggregating", "closed", "abandoned"]


class RoundView(Strict):
    round: int
    trial: int
    state: RoundState
    reason: str
    abandoned: list[str] = Field(description="Why earlier trials were abandoned")
    phases: dict[str, PhaseView]
    metrics: dict[str, float | None] = Field(description="None: not a finite number")
    seconds: float | None
    bytes_up: int
    bytes_down: int


RunState = Literal["starting", "running", "paused", "publishing", "completed", "failed", "cancelled"]
RUN_ENDED: frozenset[RunState] = frozenset({"completed", "failed", "cancelled"})


class RunView(Strict):
    """A run with its rounds."""

    run: str
    app: str
    model: str | None
    state: RunState
    reason: str
    version: int | None = Field(description="Of the release that it produced")
    by: str
    attempt: int
    requested_at: datetime
    selector: dict[str, str]
    participants: list[str]
    rounds: list[RoundView]
    seconds: float | None = Field(default=None, description="From request to end")


class ReleaseView(Strict):
    version: int
    digest: str
    size_bytes: int
    metrics: dict[str, float | None]
    labels: list[str]
    lineage: Lineage
    signed: bool = Field(default=False, description="Whether those who may vouch for it have")


class ModelView(Strict):
    model: str
    releases: list[ReleaseView]
    latest: int | None


GateOutcome = Literal["pass", "fail", "inconclusive", "error"]


class GateView(Strict):
    gate: str
    outcome: GateOutcome
    reason: str
    enforced: bool


WaveState = Literal["waiting", "caching", "offering", "baking", "over", "takenback"]


class WaveView(Strict):
    """One region of a roll-out."""

    region: str
    group: int
    state: WaveState
    nodes: int
    canaries: list[str]
    phases: dict[NodePhase, int]
    confirmed: int
    failed: int
    absent: int
    reasons: dict[str, str]
    gates: list[GateView]
    measured: Measured
    wan_bytes: int
    seconds: float | None


RolloutState = Literal["rolling", "paused", "completed", "rolledback", "superseded"]
ROLLOUT_OPEN: frozenset[RolloutState] = frozenset({"rolling", "paused"})


class RolloutView(Strict):
    """A roll-out with its waves, in the order of its plan."""

    rollout: str
    model: str
    version: int
    release: str
    state: RolloutState
    reason: str
    started_at: datetime
    by: str
    counter: int
    wan_bytes: int
    catch_up: int
    regions: list[WaveView]


class ModelProgress(Strict):
    """How far a model is. `run` and `rollout`: those under way, or the last ones; empty: there was none."""

    model: str
    latest: int | None
    serving: dict[str, int] = Field(description="By version: on how many nodes; the one of most nodes first")
    run: str = ""
    rollout: str = ""


class PlannedRegion(Strict):
    region: str
    group: int
    approval: bool
    canaries: list[str]
    nodes: list[str]
    offline: list[str]
    wan_bytes: int


class PlannedRollout(Strict):
    """A dry run: what a roll-out would do."""

    model: str
    version: int
    nodes: int
    wan_bytes: int
    bytes_per_node: int
    at_least_seconds: float
    regions: list[PlannedRegion]
    gates: list[Gate]
    on_failure: OnFailure


FiringOutcome = Literal[
    "fired", "queued", "condition", "error", "duplicate", "cooldown", "budget", "busy", "queue full", "failed"
]


class FiringView(Strict):
    """How a rule decided on one event."""

    at: datetime
    signal: str
    type: str
    outcome: FiringOutcome
    reason: str = ""
    started: str = ""


class TriggerView(Strict):
    trigger: str
    on: str
    where: str
    does: str
    policy: str
    fired: int
    budget: int | None
    active: str | None
    queued: int
    rule: TriggerRule
    history: list[FiringView] = Field(description="Newest last")


class TriggerTest(Strict):
    """What an event would do, without doing it."""

    rule: str
    signal: Signal
    outcome: FiringOutcome | Literal["not listening"]
    reason: str
    would_start: str | None = None


class SignalReceipt(Strict):
    """An event from outside was accepted; `rules`: the outcome for each rule that listens to it."""

    id: str
    rules: dict[str, FiringOutcome]


TokenState = Literal["open", "spent", "expired", "revoked"]


class SignalReceipts(Strict):
    """Of a batch, in its order."""

    events: list[SignalReceipt]


class JoinTokenView(Strict):
    token: str
    region: str
    state: TokenState
    uses_left: int
    expires: datetime
    replaces: bool
    by: str


class NewJoinToken(Strict):
    """Shown once."""

    token: str


class Revoked(Strict):
    """The node whose credentials were withdrawn."""

    revoked: str


class RoleRights(Strict):
    """What users of a role may do; -1: no limit."""

    publish: list[str]
    subscribe: list[str]
    answers: bool
    subscriptions: int
    payload_bytes: int


class AccountRights(Strict):
    """An account as the servers know it."""

    account: str
    key: str
    jetstream: bool
    exports: list[str]
    imports: list[str]
    withdrawn: int
    roles: dict[str, RoleRights]


class Rights(Strict):
    """All accounts of an installation."""

    accounts: list[AccountRights]


class RegionView(Strict):
    """A region. One that is not `configured` has nodes or credentials, and no coordinator looks after it."""

    region: str
    configured: bool
    nodes: int
    online: int
    credentials_expire: datetime | None = None
    waits: str = Field(default="", description="Why it cannot take part yet")


class Removed(Strict):
    """The node or region that was forgotten."""

    removed: str


class RegionCredentials(Strict):
    """What the servers of a region need."""

    files: dict[str, str]
    accounts: dict[str, str]


class HistoryEntry(Strict):
    """One step on the way to the present state; `event` is its id in the log."""

    at: datetime
    event: str
    what: str


class WhyView(Strict):
    """Why something is as it is: its present state, then the events that led to it."""

    present: list[str]
    because: list[HistoryEntry]


class EventView(Strict):
    """One event of the log. `data` is the event's own; its fields depend on `kind`."""

    id: str
    source: str
    time: datetime
    kind: str
    what: str = Field(description="A sentence")
    data: dict[str, Any]


ParkedKind = Literal["report", "command", "event"]


class ParkedView(Strict):
    """What could not be applied or carried out.

    A `report` of a node or aggregator and a `command` of the coordinator can be tried again; an `event` is in the log,
    and this version cannot apply it.
    """

    id: str
    kind: ParkedKind
    at: datetime
    subject: str = Field(description="Of a report: its subject on the broker; else what it is about")
    reason: str
    what: str = Field(default="", description="The beginning of a report; the name of a command; an event's kind")
    cause: str = Field(default="", description="Of a command: the id of the event that it follows from")


class SampleCounts(Strict):
    """Samples of one model on a node."""

    samples: int
    labelled: int
    bytes: int


class SamplesView(Strict):
    node: str
    models: dict[str, SampleCounts]


class LabelsMatched(Strict):
    received: int
    matched: int


class SamplesForgotten(Strict):
    deleted: int
