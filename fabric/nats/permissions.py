"""Which subjects each role may use. Everything that is not listed is refused by the server. Pure.

A server sends an answer to whatever subject the request names. So a role that can store arbitrary data must not be
able to make the server read it back: it could have it sent in somebody else's name. Nodes read streams that only the
cloud writes, and nothing from the streams that nodes write (docs/decisions/0016-identities.md).
"""

from __future__ import annotations

from dataclasses import dataclass

from fedtide.fabric.nats.stream_reads import floor_keeper
from fedtide.fabric.nats.streams import HUB_DOMAIN
from fedtide.fabric.nats.subjects import (
    CACHE,
    CHECKPOINTS,
    COLLECTOR,
    DOWN,
    FOLD_WORKER,
    HUB_REGION,
    RELEASES,
    STAY,
    UP,
    Subjects,
    reply_consumer,
)

ANSWER_WITHIN_NS = 300 * 1_000_000_000


@dataclass(frozen=True, slots=True)
class Permissions:
    """`answers`: may answer requests that reach it, once each, within five minutes."""

    publish: tuple[str, ...]
    subscribe: tuple[str, ...]
    answers: bool = False

    def claims(self) -> dict[str, object]:
        """As the `nats` part of a user's JWT has them. An empty list would allow everything: it is never written."""
        about: dict[str, object] = {
            "pub": {"allow": list(self.publish)} if self.publish else {"deny": [">"]},
            "sub": {"allow": list(self.subscribe)} if self.subscribe else {"deny": [">"]},
        }
        if self.answers:
            about["resp"] = {"max": 1, "ttl": ANSWER_WITHIN_NS}
        return about


def everything(inbox: str) -> Permissions:
    """A coordinator: everything in the account of its tenant, and in no other."""
    return Permissions((">",), (f"_INBOX.{inbox}.>", ">"))


def joiner(subjects: Subjects, token: str) -> Permissions:
    """What a join token allows: to ask for credentials, nothing else."""
    return Permissions((subjects.rpc(f"enrol.{token}"),), (f"_INBOX.join.{token}.>",))


def node_inbox(region: str, node: str) -> str:
    return f"_INBOX.node.{region}.{node}"


def node(subjects: Subjects, region: str, node: str) -> Permissions:
    """One node: its own messages, the orders for it, and blobs by their digests."""
    root, orders = subjects.root, subjects.down_node(region, node)
    name = order_consumer(node)
    return Permissions(
        publish=(
            f"{root}.up.{region}.{node}.>",
            f"{root}.stay.{region}.{node}.>",
            subjects.telemetry(region, node),
            subjects.renewal(region, node),
            f"$JS.API.DIRECT.GET.{DOWN}.{orders}",
            f"$JS.API.CONSUMER.CREATE.{DOWN}.{name}.{orders}",
            f"$JS.API.CONSUMER.MSG.NEXT.{DOWN}.{name}",
            f"$JS.API.CONSUMER.DELETE.{DOWN}.{name}",
            f"$JS.API.DIRECT.GET.{CACHE}.{subjects.all_cached(region)}",
            f"$JS.{HUB_DOMAIN}.API.DIRECT.GET.{RELEASES}.{subjects.all_releases}",
            *(f"{api}.DIRECT.GET.{DOWN}.{root}.down.{kind}.>" for api in _APIS for kind in ("blob", "round")),
        ),
        subscribe=(
            f"{node_inbox(region, node)}.>",
            subjects.live_node(region, node),
            subjects.infer(region, node, "*"),
            subjects.samples(region, node, "*"),
        ),
        answers=True,
    )


def order_consumer(node: str) -> str:
    """The short-lived consumer through which a node reads what it missed."""
    return f"node-{node}"


def aggregator(subjects: Subjects, run: str) -> Permissions:
    """One run's aggregator and its shards. It reads that run's updates; it may ask any node to train."""
    root, consumer = subjects.root, reply_consumer(run)
    keeper = floor_keeper(consumer)
    return Permissions(
        publish=(
            f"{root}.up.{HUB_REGION}.{run}.>",
            f"{root}.up.{HUB_REGION}.{FOLD_WORKER}.blob.{run}.>",
            subjects.all_tasks,
            f"{root}.down.round.{run}.>",
            f"{root}.down.blob.>",
            subjects.all_releases,
            subjects.checkpoints(run),
            subjects.rpc("cohort"),
            subjects.rpc("fold.*"),
            *(f"$JS.API.STREAM.INFO.{stream}" for stream in (DOWN, UP, RELEASES, CHECKPOINTS)),
            # A server reads `$JS.hub.API` as its own `$JS.API` before it looks at permissions.
            *(f"{api}.STREAM.PURGE.{stream}" for api in ("$JS.API", "$JS.*.API") for stream in (DOWN, UP, STAY)),
            f"$JS.API.STREAM.PURGE.{CHECKPOINTS}",
            f"$JS.API.DIRECT.GET.{DOWN}.{subjects.all_down}",
            f"$JS.API.DIRECT.GET.{RELEASES}.{subjects.all_releases}",
            f"$JS.API.DIRECT.GET.{CHECKPOINTS}.{subjects.checkpoints(run)}",
            f"$JS.API.DIRECT.GET.{CHECKPOINTS}",
            *(f"{api}.DIRECT.GET.{UP}.{root}.up.*.*.blob.{run}.>" for api in ("$JS.API", "$JS.*.API")),
            f"$JS.*.API.DIRECT.GET.{STAY}.{root}.stay.*.*.blob.{run}.>",
            f"$JS.API.CONSUMER.MSG.NEXT.{UP}.{consumer}",
            *(f"$JS.API.CONSUMER.CREATE.{UP}.{name}.{subjects.replies(run)}" for name in (consumer, keeper)),
            *(f"$JS.API.CONSUMER.{verb}.{UP}.{name}" for verb in ("INFO", "DELETE") for name in (consumer, keeper)),
            f"$JS.ACK.{UP}.{consumer}.>",
            f"$JS.ACK.*.*.{UP}.{consumer}.>",
        ),
        subscribe=(f"_INBOX.agg.{run}.>", subjects.all_presence, subjects.order(run), subjects.rpc("fold.*")),
        answers=True,
    )


def folder(subjects: Subjects, region: str) -> Permissions:
    """A regional aggregator: it reads its region's updates, and stores their sums."""
    root = subjects.root
    return Permissions(
        publish=(
            f"{root}.up.{region}.{FOLD_WORKER}.blob.>",
            *(f"$JS.API.STREAM.INFO.{stream}" for stream in (UP, STAY)),
            f"$JS.API.DIRECT.GET.{UP}.{root}.up.{region}.*.blob.>",
            f"$JS.API.DIRECT.GET.{STAY}.{root}.stay.{region}.*.blob.>",
        ),
        subscribe=(f"_INBOX.fold.{region}.>", subjects.rpc(f"fold.{region}")),
        answers=True,
    )


def collector(subjects: Subjects, region: str) -> Permissions:
    """A drift collector: it sums the drift sketches of a region's nodes."""
    sketches = subjects.drifts(region, "*", "*")
    return Permissions(
        publish=(
            subjects.report(region, COLLECTOR, "drift-reported"),
            f"{subjects.root}.stay.{region}.{COLLECTOR}.>",
            f"$JS.API.DIRECT.GET.{STAY}",
            f"$JS.API.DIRECT.GET.{STAY}.{subjects.root}.stay.{region}.{COLLECTOR}.>",
        ),
        subscribe=(f"_INBOX.collector.{region}.>", sketches),
    )


def leaf(subjects: Subjects, region: str) -> Permissions:
    """A region's server, as the hub sees it: it publishes for its own region only, and receives only what goes there.

    `$JS.S` and `$JS.M` are deliveries to sources and mirrors, `$JS.FC` their flow control, `$JSC.R` answers between
    servers.
    """
    root, hub = subjects.root, f"$JS.{HUB_DOMAIN}.API"
    return Permissions(
        publish=(
            f"{root}.up.{region}.>",
            f"{root}.tel.{region}.*",
            subjects.enrolment("*"),
            subjects.renewal(region, "*"),
            "_INBOX.>",
            "$JS.FC.>",
            "$JS.S.>",
            "$JSC.R.>",
            f"{hub}.DIRECT.GET.{RELEASES}.{subjects.all_releases}",
            f"{hub}.DIRECT.GET.{DOWN}.{root}.down.blob.>",
            f"{hub}.DIRECT.GET.{DOWN}.{root}.down.round.>",
            f"{hub}.CONSUMER.CREATE.{DOWN}.>",
            f"{hub}.CONSUMER.CREATE.{DOWN}",
        ),
        subscribe=(
            "_INBOX.join.>",
            *(f"_INBOX.{role}.{region}.>" for role in ("node", "fold", "collector")),
            f"{root}.infer.{region}.>",
            f"{root}.samples.{region}.>",
            subjects.all_cached(region),
            subjects.rpc(f"fold.{region}"),
            f"$JS.{region}.API.>",
            "$JS.FC.>",
            "$JS.M.>",
            "$JSC.R.>",
        ),
    )


def leaf_system() -> Permissions:
    """A region's link to the system account: it hears which keys were withdrawn, and says nothing."""
    return Permissions((), ("$SYS.REQ.CLAIMS.UPDATE", "$SYS.REQ.ACCOUNT.*.CLAIMS.UPDATE"))


def system() -> Permissions:
    """The coordinator's connection to the system account: it publishes accounts, and hears who connects."""
    return Permissions(("$SYS.REQ.CLAIMS.UPDATE",), ("_INBOX.system.>", "$SYS.ACCOUNT.*.CONNECT"))


_APIS = ("$JS.API", f"$JS.{HUB_DOMAIN}.API")
