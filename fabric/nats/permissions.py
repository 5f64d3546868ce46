"""Which subjects each role may use. Everything that is not listed is refused by the server. Pure.

A role is a template: `{{name()}}` and `{{tag(region)}}` are those of the user, and the server fills them in. Accounts
(`accounts`) decide what a subject leads to; this, who may use it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from fedtide.fabric.nats.accounts import CORE, NODES, RUNS, hub_of, region_account, streams_of
from fedtide.fabric.nats.streams import HUB_DOMAIN, MIRRORED, down_delivery, mirror_consumer, up_delivery
from fedtide.fabric.nats.subjects import (
    CACHE,
    CHECKPOINTS,
    COLLECTOR,
    DOWN,
    FOLD_WORKER,
    HUB_REGION,
    ORDERS,
    REGIONS_OWN,
    RELEASES,
    STAY,
    UP,
    Subjects,
    reply_consumer,
)

SERVER_STATISTICS = "$SYS.SERVER.*.STATSZ"
CLAIMS = "$SYS.REQ.CLAIMS.UPDATE"
"""On which every server is told of accounts."""
LIMITS_OF = "$SYS.REQ.ACCOUNT.{}.CLAIMS.LOOKUP"
"""An account as the hub knows it, by its public key."""
STORES = "$SYS.REQ.SERVER.PING.JSZ"
"""What each server has stored, by account."""
ANSWER_WITHIN_NS = 300 * 1_000_000_000
NAME, REGION = "{{name()}}", "{{tag(region)}}"
COORDINATOR, SIGNS, AGGREGATOR, NODE, JOINER, COLLECTS, FOLDS, RENEWS = (
    "coordinator",
    "signer",
    "aggregator",
    "node",
    "joiner",
    "collector",
    "folder",
    "renewer",
)
SYSTEM, SYSTEM_LEAF = "system", "system-leaf"
_KIB = 1024


@dataclass(frozen=True, slots=True)
class Permissions:
    """What users of a role may do.

    Args:
        answers: may answer requests that reach it, once each, within five minutes.
        subscriptions: how many it may have at a time (-1: any number).
        payload_bytes: of one message (-1: as large as the server takes).
    """

    publish: tuple[str, ...]
    subscribe: tuple[str, ...]
    answers: bool = False
    subscriptions: int = -1
    payload_bytes: int = -1

    def claims(self) -> dict[str, object]:
        """As the `nats` part of a user's JWT has them. An empty list would allow everything: it is never written."""
        about: dict[str, object] = {
            "pub": {"allow": list(self.publish)} if self.publish else {"deny": [">"]},
            "sub": {"allow": list(self.subscribe)} if self.subscribe else {"deny": [">"]},
            "subs": self.subscriptions,
            "data": -1,
            "payload": self.payload_bytes,
        }
        if self.answers:
            about["resp"] = {"max": 1, "ttl": ANSWER_WITHIN_NS}
        return about


def claims_of(account: str) -> str:
    """On which servers are told of one account, by its public key; regions do not hear that."""
    return f"$SYS.REQ.ACCOUNT.{account}.CLAIMS.UPDATE"


def inbox(role: str, name: str = NAME) -> str:
    """The prefix of the subjects on which answers reach a user; what follows is random for each connection."""
    return f"_INBOX.{role}.{name}"


def roles(subjects: Subjects) -> Mapping[str, Mapping[str, Permissions]]:
    """By account, then by role, but for those of regions (`leaf`)."""
    return {
        CORE: {COORDINATOR: Permissions((">",), (">",))},
        RUNS: {AGGREGATOR: aggregator(subjects), SIGNS: signer(subjects)},
        NODES: {
            NODE: node(subjects),
            JOINER: joiner(subjects),
            COLLECTS: collector(subjects),
            FOLDS: folder(subjects),
            RENEWS: renewer(subjects),
        },
    }


def of_account(subjects: Subjects, account: str) -> Mapping[str, Permissions]:
    """The roles of an account, by name; those of a region's link and of the servers' own account too."""
    if account.startswith(region_account("")):
        return {"leaf": leaf(subjects, account.removeprefix(region_account("")))}
    if account == SYSTEM:
        return {SYSTEM: system(), SYSTEM_LEAF: leaf_system()}
    return roles(subjects).get(account, {})


def joiner(subjects: Subjects) -> Permissions:
    """What a join token allows: to ask for credentials, nothing else."""
    return Permissions(
        (subjects.enrolment("*", NAME),), (f"{inbox(JOINER)}.>",), subscriptions=8, payload_bytes=64 * _KIB
    )


def node(subjects: Subjects) -> Permissions:
    """One node: its own messages, the orders for it, and blobs by their digests."""
    root = subjects.root
    here, hub = f"$JS.{streams_of(REGION)}.API.DIRECT.GET", f"$JS.{hub_of(REGION)}.API.DIRECT.GET"
    blobs = [f"{DOWN}.{root}.down.{kind}.>" for kind in ("blob", "round")]
    return Permissions(
        publish=(
            f"{root}.up.{REGION}.{NAME}.>",
            f"{root}.stay.{REGION}.{NAME}.>",
            subjects.telemetry(REGION, NAME),
            subjects.renewal(REGION, NAME),
            subjects.orders(REGION, NAME),
            f"{here}.{DOWN}.{subjects.down_node(REGION, NAME)}",
            f"{here}.{ORDERS}.{subjects.desired_of(REGION, NAME)}",
            f"{here}.{CACHE}.{subjects.all_cached(REGION)}",
            *(f"{there}.{blob}" for there in (here, hub) for blob in blobs),
            f"{hub}.{RELEASES}.{subjects.root}.rel.blob.>",
        ),
        subscribe=(
            f"{inbox(NODE)}.>",
            subjects.live_node(REGION, NAME),
            subjects.infer(REGION, NAME, "*"),
            subjects.samples(REGION, NAME, "*"),
            subjects.logs(REGION, NAME, "*"),
        ),
        answers=True,
        subscriptions=256,
    )


def signer(subjects: Subjects) -> Permissions:
    """The release authority: it answers, and nothing else."""
    return Permissions((), (subjects.signing,), answers=True, subscriptions=4)


def aggregator(subjects: Subjects) -> Permissions:
    """One run's aggregator and its shards. It reads that run's updates; it may ask any node to train for that run."""
    root, consumer = subjects.root, reply_consumer(NAME)
    return Permissions(
        publish=(
            f"{root}.up.{HUB_REGION}.{NAME}.>",
            f"{root}.up.{HUB_REGION}.{FOLD_WORKER}.blob.{NAME}.>",
            f"{root}.down.node.*.*.task.{NAME}.*",
            subjects.round_blobs(NAME),
            subjects.release_uploads(NAME),
            subjects.checkpoints(NAME),
            subjects.asked_by_run(NAME, "*"),
            subjects.fold("*"),
            subjects.shard(NAME, "*"),
            f"$JS.API.DIRECT.GET.{DOWN}.{root}.down.blob.>",
            f"$JS.API.DIRECT.GET.{DOWN}.{subjects.round_blobs(NAME)}",
            f"$JS.API.DIRECT.GET.{DOWN}.{subjects.tasks_of(NAME)}",
            f"$JS.API.DIRECT.GET.{RELEASES}.{root}.rel.blob.>",
            f"$JS.API.DIRECT.GET.{RELEASES}.{subjects.release_uploads(NAME)}",
            f"$JS.API.DIRECT.GET.{CHECKPOINTS}.{subjects.checkpoints(NAME)}",
            f"$JS.API.DIRECT.GET.*.{root}.up.*.*.blob.{NAME}.>",
            f"$JS.*.API.DIRECT.GET.{UP}.{root}.up.*.*.blob.{NAME}.>",
            f"$JS.*.API.DIRECT.GET.{STAY}.{root}.stay.*.*.blob.{NAME}.>",
            f"$JS.API.CONSUMER.MSG.NEXT.*.{consumer}",
            f"$JS.ACK.*.{consumer}.>",
            f"$JS.ACK.*.*.*.{consumer}.>",
        ),
        subscribe=(f"{inbox(AGGREGATOR)}.>", subjects.all_presence, subjects.order(NAME), subjects.shard(NAME, "*")),
        answers=True,
    )


def folder(subjects: Subjects) -> Permissions:
    """A regional aggregator: it reads its region's updates, and stores their sums."""
    root, here = subjects.root, f"$JS.{streams_of(REGION)}.API.DIRECT.GET"
    return Permissions(
        publish=(
            f"{root}.up.{REGION}.{FOLD_WORKER}.blob.>",
            subjects.telemetry(REGION, FOLD_WORKER),
            subjects.orders(REGION, FOLD_WORKER),
            f"{here}.{UP}.{root}.up.{REGION}.*.blob.>",
            f"{here}.{STAY}.{root}.stay.{REGION}.*.blob.>",
        ),
        subscribe=(f"{inbox(FOLDS)}.>", subjects.fold(REGION)),
        answers=True,
        subscriptions=64,
    )


def collector(subjects: Subjects) -> Permissions:
    """A drift collector: it sums the drift sketches of a region's nodes."""
    root, here = subjects.root, f"$JS.{streams_of(REGION)}.API.DIRECT.GET"
    return Permissions(
        publish=(
            subjects.report(REGION, COLLECTOR, "drift-reported"),
            subjects.telemetry(REGION, COLLECTOR),
            f"{root}.stay.{REGION}.{COLLECTOR}.>",
            f"{here}.{STAY}",
            f"{here}.{STAY}.{root}.stay.{REGION}.{COLLECTOR}.>",
        ),
        subscribe=(f"{inbox(COLLECTS)}.>", subjects.drifts(REGION, "*", "*")),
        subscriptions=64,
    )


def renewer(subjects: Subjects) -> Permissions:
    """What asks for new credentials of a region's processes, now and then, and does nothing else."""
    return Permissions((subjects.renewal(REGION, REGIONS_OWN),), (f"{inbox(RENEWS)}.>",), subscriptions=8)


def leaf(subjects: Subjects, region: str) -> Permissions:
    """A region's server, as the hub sees it: it publishes for its own region only, and receives only what goes there.

    `$JSC.R` and `_R_` are answers between servers, `$JS.FC` the flow control of sources and mirrors, `$LDS` how servers
    find loops of links. It may also publish to what it receives: when an account that its own one imports from changes,
    nats-server 2.15 takes away what a link has subscribed to and may not publish to. Nobody else listens there.
    """
    root, hub, consumer = subjects.root, f"$JS.{HUB_DOMAIN}.API", mirror_consumer(region)
    received = (
        *(down_delivery(region, stream) for stream in MIRRORED),
        f"$JS.{region}.API.>",
        f"$JS.FC.{region}.*.{UP}.>",
        subjects.all_cached(region),
        subjects.infer(region, "*", "*"),
        subjects.samples(region, "*", "*"),
        subjects.logs(region, "*", "*"),
        subjects.fold(region),
        "$JSC.R.>",
        "_R_.>",
    )
    return Permissions(
        publish=(
            f"{up_delivery(region)}.>",
            subjects.telemetry(region, "*"),
            subjects.enrolment(region, "*"),
            subjects.renewal(region, "*"),
            subjects.orders(region, "*"),
            *(f"{hub}.CONSUMER.RESET.{stream}.{consumer}" for stream in MIRRORED),
            *(f"$JS.FC.{where}{s}.{consumer}.>" for s in MIRRORED for where in ("", f"{HUB_DOMAIN}.*.")),
            f"{hub}.DIRECT.GET.{RELEASES}.{root}.rel.blob.>",
            *(f"{hub}.DIRECT.GET.{DOWN}.{root}.down.{kind}.>" for kind in ("blob", "round")),
            *received,
            "$LDS.>",
        ),
        subscribe=received,
    )


def leaf_system() -> Permissions:
    """A region's link to the system account: it hears which keys were withdrawn, and says nothing.

    It does not hear what the hub alone is told: the accounts of tenants.
    """
    return Permissions((), (CLAIMS,))


def system() -> Permissions:
    """The coordinator on the system account: it publishes and reads accounts, and hears who comes and what is used."""
    return Permissions(
        (CLAIMS, claims_of("*"), LIMITS_OF.format("*"), STORES),
        (f"{inbox(SYSTEM)}.>", "$SYS.ACCOUNT.*.CONNECT", SERVER_STATISTICS),
    )
