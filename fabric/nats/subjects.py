"""Every subject and stream name in one place.

A subject is `ft.v1.<tenant>.` plus one of:

    evt.<kind>.<id>                               event log (fenced writer)          stream EVENTS, hub
    down.blob.<digest>.<chunk>                    content-addressed bytes            stream DOWN, hub + leaf mirrors
    down.round.<run>.<digest>.<chunk>             the same, of one run's rounds      stream DOWN
    down.node.<region>.<node>.task.<run>.<task>   tasks                              stream DOWN
    down.node.<region>.<node>.desired.<model>     desired state                      stream ORDERS, hub + leaf mirrors
    live.node.<region>.<node>.>                   what the leaf has just stored      plain, republished
    rel.blob.<digest>.<chunk>                     what releases consist of           stream RELEASES, hub
    rel.new.<run>.<digest>.<chunk>                the same, as a run has made it     stream RELEASES
    cache.<region>.blob.<digest>.<chunk>          the same, where it is to be served stream CACHE, leaf only
    up.<region>.<node>.rpt.<kind>                 reports to the coordinator         stream UP, leaf; UP_<region>, hub
    up.<region>.<node>.reply.<run>.<task>         replies to tasks                   stream UP
    up.<region>.<node>.blob.<run>.<digest>.<n>    tensors of updates                 stream UP
    stay.<region>.<node>.blob.<run>.<digest>.<n>  tensors that a partial aggregator sums  stream STAY, leaf only
    ckpt.<run>.<what>                             checkpoints of aggregators          stream CHECKPOINTS, hub
    ctl.<what>                                    lease and snapshots of coordinators stream CONTROL, hub
    stay.<region>.<node>.drift.<model>.<window>   what a node saw, as histograms     stream STAY, leaf only
    stay.<region>.collector.<what>                what drift is measured against     stream STAY, leaf only
    parked.<id>                                   reports that could not be applied  stream PARKED, hub
    audit                                         who did what                       stream AUDIT, hub
    infer.<region>.<node>.<model>                 inference requests to a node       plain
    samples.<region>.<node>.<model>               labels and counts of its samples   plain
    logs.<region>.<node>.<run>                    what an app printed there          plain
    tel.<region>.<node>                           heartbeats (lossy)                 plain
    fleet.<node>                                  presence changes                   plain
    rpc.run.<run>.<verb>                          an aggregator asks the coordinator plain
    rpc.fold.<region>                             an aggregator asks a fold worker   plain
    rpc.shard.<run>.<worker>                      the same, one that it has started  plain
    rpc.enrol.<region>.<token>                    a new node asks for credentials    plain
    rpc.renew.<region>.<node>                     a node asks for fresh ones         plain
    rpc.orders.<region>.<node>                    a node asks which orders it has    plain
    rpc.sign.release                              the release authority is asked     plain, hub only

The node comes before the name, so one wildcard covers one node's whole permission. Blobs and the
tasks that need them share one stream: a mirror keeps its order, so a node that sees a task finds
its blobs already in the region. Releases are not mirrored: the coordinator copies them to the
regions of a roll-out, before it offers them to a node. The hub keeps what comes up in one stream
for each region: whatever a region's server sends, it is read as that region's only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeVar

from fedtide.fabric.errors import MalformedMessage

EVENTS = "EVENTS"
DOWN = "DOWN"
ORDERS = "ORDERS"
UP = "UP"
STAY = "STAY"
RELEASES = "RELEASES"
CACHE = "CACHE"
CHECKPOINTS = "CHECKPOINTS"
CONTROL = "CONTROL"
PARKED = "PARKED"
AUDIT = "AUDIT"

COLLECTOR = "collector"
"""Takes the place of the node in subjects of a region's drift collector."""

FOLD_WORKER = "fold"
"""Takes the place of the node in the subjects of partial sums."""

REGIONS_OWN = "region"
"""In the place of a node, where a region asks for itself."""
RESERVED = (COLLECTOR, FOLD_WORKER, REGIONS_OWN)
"""Used in place of a node's name: no node may have one of these names."""

LOG_OF = "-log"
"""What the name of a run has behind it where its log is kept."""
ALL_MODELS = "_"
"""Stands for the model in a question about the samples of every model; no model may have this name."""

HUB_REGION = "hub"
"""The region name of processes beside the hub (aggregators); no node may use it."""


@dataclass(frozen=True, slots=True)
class Subjects:
    """Spells the subjects of one tenant."""

    tenant: str = "default"

    @property
    def root(self) -> str:
        return f"ft.v1.{self.tenant}"

    def event(self, kind: str, key: str) -> str:
        return f"{self.root}.evt.{kind}.{key}"

    @property
    def all_events(self) -> str:
        return f"{self.root}.evt.>"

    def parked(self, id: str) -> str:
        return f"{self.root}.parked.{id}"

    @property
    def audit(self) -> str:
        return f"{self.root}.audit"

    @property
    def all_parked(self) -> str:
        return f"{self.root}.parked.*"

    @property
    def all_blobs(self) -> str:
        """Content-addressed bytes for nodes: bundles of apps."""
        return f"{self.root}.down.blob.>"

    @property
    def all_round_blobs(self) -> str:
        return f"{self.root}.down.round.>"

    @property
    def all_tasks(self) -> str:
        return f"{self.root}.down.node.*.*.task.>"

    @property
    def all_desired(self) -> str:
        return f"{self.root}.down.node.*.*.desired.*"

    @property
    def all_down(self) -> tuple[str, ...]:
        """What the stream DOWN captures: bulk, and what comes with it."""
        return self.all_blobs, self.all_round_blobs, self.all_tasks

    @property
    def down_nodes(self) -> str:
        return f"{self.root}.down.node.>"

    @property
    def live_nodes(self) -> str:
        return f"{self.root}.live.node.>"

    def blob(self, digest: str) -> str:
        """The prefix of one down blob; chunks and the manifest stand below it."""
        return f"{self.root}.down.blob.{digest}"

    def round_blob(self, run: str, digest: str) -> str:
        """As `blob`, for what only one run's rounds need."""
        return f"{self.root}.down.round.{run}.{digest}"

    def round_blobs(self, run: str) -> str:
        return f"{self.root}.down.round.{run}.>"

    def down_node(self, region: str, node: str) -> str:
        return f"{self.root}.down.node.{region}.{node}.>"

    def live_node(self, region: str, node: str) -> str:
        return f"{self.root}.live.node.{region}.{node}.>"

    def task(self, region: str, node: str, run: str, task: str) -> str:
        return f"{self.root}.down.node.{region}.{node}.task.{run}.{task}"

    def tasks_of(self, run: str) -> str:
        return f"{self.root}.down.node.*.*.task.{run}.*"

    def desired_of(self, region: str, node: str) -> str:
        return f"{self.root}.down.node.{region}.{node}.desired.*"

    def desired(self, region: str, node: str, model: str) -> str:
        return f"{self.root}.down.node.{region}.{node}.desired.{model}"

    def all_up(self, region: str) -> str:
        return f"{self.root}.up.{region}.>"

    def report(self, region: str, node: str, kind: str) -> str:
        return f"{self.root}.up.{region}.{node}.rpt.{kind}"

    def replies_of(self, region: str) -> str:
        """Of all runs."""
        return f"{self.root}.up.{region}.*.reply.>"

    def reports_of(self, region: str) -> str:
        return f"{self.root}.up.{region}.*.rpt.>"

    def reply(self, region: str, node: str, run: str, task: str) -> str:
        return f"{self.root}.up.{region}.{node}.reply.{run}.{task}"

    def replies(self, region: str, run: str) -> str:
        return f"{self.root}.up.{region}.*.reply.{run}.>"

    def update_blob(self, region: str, node: str, run: str, digest: str) -> str:
        """The prefix of one update's tensors; chunks and the manifest stand below it."""
        return f"{self.root}.up.{region}.{node}.blob.{run}.{digest}"

    def update_blobs(self, region: str, run: str, digest: str = "*") -> str:
        return f"{self.root}.up.{region}.*.blob.{run}.{digest}.>"

    def release_blob(self, digest: str) -> str:
        """The prefix of one blob of a release, at the hub."""
        return f"{self.root}.rel.blob.{digest}"

    def release_upload(self, run: str, digest: str) -> str:
        """As `release_blob`, where the run stores it that has made it."""
        return f"{self.root}.rel.new.{run}.{digest}"

    def release_uploads(self, run: str) -> str:
        return f"{self.root}.rel.new.{run}.>"

    @property
    def all_releases(self) -> str:
        return f"{self.root}.rel.>"

    def cache_blob(self, region: str, digest: str) -> str:
        """The same, in a region."""
        return f"{self.root}.cache.{region}.blob.{digest}"

    def all_cached(self, region: str) -> str:
        return f"{self.root}.cache.{region}.>"

    def drift(self, region: str, node: str, model: str, window: int) -> str:
        return f"{self.root}.stay.{region}.{node}.drift.{model}.{window}"

    def drifts(self, region: str, model: str = "*", window: int | str = "*") -> str:
        return f"{self.root}.stay.{region}.*.drift.{model}.{window}"

    def drift_reference(self, region: str, model: str, release: str) -> str:
        return f"{self.root}.stay.{region}.{COLLECTOR}.reference.{model}.{release}"

    def infer(self, region: str, node: str, model: str) -> str:
        return f"{self.root}.infer.{region}.{node}.{model}"

    def samples(self, region: str, node: str, model: str) -> str:
        """`model` may be ALL_MODELS."""
        return f"{self.root}.samples.{region}.{node}.{model}"

    def logs(self, region: str, node: str, run: str) -> str:
        return f"{self.root}.logs.{region}.{node}.{run}"

    def run_log(self, run: str, slot: str) -> str:
        """A part of what the run's ServerApp has printed."""
        return self.checkpoint(run, f"log.{slot}")

    def kept_run_log(self, run: str, slot: str) -> str:
        """The same, after the run is completed."""
        return self.run_log(f"{run}{LOG_OF}", slot)

    def all_staying(self, region: str) -> str:
        return f"{self.root}.stay.{region}.>"

    def stay_blob(self, region: str, node: str, run: str, digest: str) -> str:
        """As `update_blob`, for what does not leave its region."""
        return f"{self.root}.stay.{region}.{node}.blob.{run}.{digest}"

    def stay_blobs(self, region: str, run: str, digest: str = "*") -> str:
        return f"{self.root}.stay.{region}.*.blob.{run}.{digest}.>"

    def checkpoint(self, run: str, what: str) -> str:
        return f"{self.root}.ckpt.{run}.{what}"

    def order(self, run: str) -> str:
        """The newest order of the coordinator to a run's aggregator; stored, and received by a plain subscription."""
        return self.checkpoint(run, "order")

    def checkpoint_blob(self, run: str, digest: str) -> str:
        return f"{self.root}.ckpt.{run}.blob.{digest}"

    def checkpoints(self, run: str = "*") -> str:
        return f"{self.root}.ckpt.{run}.>"

    @property
    def all_control(self) -> str:
        return f"{self.root}.ctl.>"

    @property
    def lease(self) -> str:
        return f"{self.root}.ctl.lease"

    @property
    def snapshot(self) -> str:
        return f"{self.root}.ctl.snapshot"

    def snapshot_blob(self, digest: str) -> str:
        return f"{self.root}.ctl.blob.{digest}"

    def telemetry(self, region: str, node: str) -> str:
        return f"{self.root}.tel.{region}.{node}"

    @property
    def all_telemetry(self) -> str:
        return f"{self.root}.tel.>"

    def presence(self, node: str) -> str:
        return f"{self.root}.fleet.{node}"

    @property
    def all_presence(self) -> str:
        return f"{self.root}.fleet.*"

    def enrolment(self, region: str, token: str) -> str:
        return self.rpc(f"enrol.{region}.{token}")

    def renewal(self, region: str, node: str) -> str:
        return self.rpc(f"renew.{region}.{node}")

    def orders(self, region: str, node: str) -> str:
        return self.rpc(f"orders.{region}.{node}")

    @property
    def signing(self) -> str:
        """The release authority."""
        return self.rpc("sign.release")

    def fold(self, region: str) -> str:
        """The fold worker of a region."""
        return self.rpc(f"fold.{region}")

    def shard(self, run: str, worker: str) -> str:
        """A fold worker that a run's aggregator has started."""
        return self.rpc(f"shard.{run}.{worker}")

    def asked_by_run(self, run: str, verb: str) -> str:
        return self.rpc(f"run.{run}.{verb}")

    def rpc(self, verb: str) -> str:
        return f"{self.root}.rpc.{verb}"


def up_stream(region: str) -> str:
    """The hub's stream of what comes from a region; on the region's own server it is `UP`."""
    return UP if region == HUB_REGION else f"{UP}_{region}"


def reply_consumer(run: str) -> str:
    """The durable consumers, one of each region's stream, through which a run's aggregators read replies."""
    return f"agg-{run}"


@dataclass(frozen=True, slots=True)
class Report:
    """`up.<region>.<node>.rpt.<kind>`; from aggregators `node` is the run and `region` is HUB_REGION."""

    region: str
    node: str
    kind: str


@dataclass(frozen=True, slots=True)
class ReplyTo:
    """`up.<region>.<node>.reply.<run>.<task>`."""

    region: str
    node: str
    run: str
    task: str


@dataclass(frozen=True, slots=True)
class OrderFor:
    """`down.node.` or `live.node.`, then `<region>.<node>.task.<run>.<task>` or `...desired.<model>`."""

    region: str
    node: str
    kind: Literal["task", "desired"]
    name: str
    run: str = ""

    @property
    def stream(self) -> str:
        return DOWN if self.kind == "task" else ORDERS


@dataclass(frozen=True, slots=True)
class Telemetry:
    """`tel.<region>.<node>`."""

    region: str
    node: str


@dataclass(frozen=True, slots=True)
class Presence:
    """`fleet.<node>`."""

    node: str


@dataclass(frozen=True, slots=True)
class SketchOf:
    """`stay.<region>.<node>.drift.<model>.<window>`."""

    region: str
    node: str
    model: str
    window: int


@dataclass(frozen=True, slots=True)
class Question:
    """`infer.<region>.<node>.<model>`, `samples.<region>.<node>.<model>` or `logs.<region>.<node>.<run>`."""

    kind: Literal["infer", "samples", "logs"]
    region: str
    node: str
    about: str


@dataclass(frozen=True, slots=True)
class EnrolmentAsked:
    """`rpc.enrol.<region>.<token>`."""

    region: str
    token: str


@dataclass(frozen=True, slots=True)
class RenewalAsked:
    """`rpc.renew.<region>.<node>`."""

    region: str
    node: str


@dataclass(frozen=True, slots=True)
class OrdersAsked:
    """`rpc.orders.<region>.<node>`."""

    region: str
    node: str


@dataclass(frozen=True, slots=True)
class RunAsks:
    """`rpc.run.<run>.<verb>`."""

    run: str
    verb: str


Address = (
    Report
    | ReplyTo
    | OrderFor
    | Telemetry
    | Presence
    | SketchOf
    | Question
    | EnrolmentAsked
    | RenewalAsked
    | OrdersAsked
    | RunAsks
)
A = TypeVar("A", bound=Address)


def parse(subject: str) -> Address:  # noqa: C901  # one table of all subjects
    """What a subject says, with exactly as many tokens as its kind has. The only place that takes subjects apart.

    Raises:
        MalformedMessage: it is of no kind that is parsed, or has too few or too many tokens.
    """
    tokens = subject.split(".")
    if tokens[:2] != ["ft", "v1"] or not all(tokens):
        raise MalformedMessage(f"{subject!r} is no subject of fedtide")
    match tokens[3:]:
        case ["up", region, node, "rpt", kind]:
            return Report(region, node, kind)
        case ["up", region, node, "reply", run, task]:
            return ReplyTo(region, node, run, task)
        case ["down" | "live", "node", region, node, "task", run, task]:
            return OrderFor(region, node, "task", task, run)
        case ["down" | "live", "node", region, node, "desired", model]:
            return OrderFor(region, node, "desired", model)
        case ["tel", region, node]:
            return Telemetry(region, node)
        case ["fleet", node]:
            return Presence(node)
        case ["stay", region, node, "drift", model, window] if window.isascii() and window.isdecimal():
            return SketchOf(region, node, model, int(window))
        case ["infer", region, node, model]:
            return Question("infer", region, node, model)
        case ["samples", region, node, model]:
            return Question("samples", region, node, model)
        case ["logs", region, node, run]:
            return Question("logs", region, node, run)
        case ["rpc", "enrol", region, token]:
            return EnrolmentAsked(region, token)
        case ["rpc", "orders", region, node]:
            return OrdersAsked(region, node)
        case ["rpc", "run", run, verb]:
            return RunAsks(run, verb)
        case ["rpc", "renew", region, node]:
            return RenewalAsked(region, node)
        case _:
            raise MalformedMessage(f"{subject!r} is of no kind that is parsed, or has too few or too many tokens")


@dataclass(frozen=True, slots=True)
class Stored:
    """What keeps a stored message alive: a run, a blob's digest, or both; `prefix` is that of the whole thing.

    `digest` is that of the release for the references of drift, only its beginning.
    """

    kind: Literal["bundle", "round", "release", "upload", "update", "reply", "checkpoint", "snapshot", "reference"]
    prefix: str
    run: str = ""
    digest: str = ""
    node: str = ""


def stored(subject: str) -> Stored | None:  # noqa: C901  # one table of all subjects
    """What a message of a stream belongs to; None: it goes by other rules, or is nothing that anybody stores."""
    tokens = subject.split(".")

    def below(count: int) -> str:
        return ".".join(tokens[: 3 + count])

    match tokens[3:]:
        case ["down", "blob", digest, _]:
            return Stored("bundle", below(3), digest=digest)
        case ["down", "round", run, digest, _]:
            return Stored("round", below(3), run, digest)
        case ["rel", "blob", digest, _]:
            return Stored("release", below(3), digest=digest)
        case ["rel", "new", run, digest, _]:
            return Stored("upload", below(3), run, digest)
        case ["up" | "stay", _, node, "blob", run, digest, _]:
            return Stored("update", below(5), run, digest, node)
        case ["up", _, node, "reply", run, _]:
            return Stored("reply", below(5), run, node=node)
        case ["ckpt", run, *rest] if rest:
            return Stored("checkpoint", below(2), run)
        case ["stay", _, collector, "reference", _, release] if collector == COLLECTOR:
            return Stored("reference", below(6), digest=release)
        case ["ctl", "blob", digest, _]:
            return Stored("snapshot", below(3), digest=digest)
        case _:
            return None


def parse_as(kind: type[A], subject: str) -> A:
    """As `parse`, for one kind; raises MalformedMessage for every other."""
    found = parse(subject)
    if not isinstance(found, kind):
        raise MalformedMessage(f"{subject!r} is no {kind.__name__}")
    return found
