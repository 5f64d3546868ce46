"""The accounts of an installation, and what each shares with which other. Pure.

A server answers a request to whatever subject the request names, with the server's own rights. So nobody but the
coordinator is in an account with streams: an answer goes to the account of whoever asked, and reaches nothing else.

    hub      core           streams, coordinators
             runs           aggregators and their shards, the release authority
             region-R       the link of region R's server
    leaf R   leaf-R         the region's streams; its link binds it to region-R
             nodes          nodes, joiners, the region's collector and fold worker

`nodes` is one account on all leaves: its members reach the server of the region they connect to, and only what carries
that region's name. Which of this each role may use stands in `permissions`; decisions/0023 says why.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from fedtide.fabric.nats.streams import HUB_DOMAIN, MIRRORED, down_delivery, mirror_consumer, up_delivery
from fedtide.fabric.nats.subjects import (
    CACHE,
    CHECKPOINTS,
    DOWN,
    HUB_REGION,
    ORDERS,
    RELEASES,
    STAY,
    UP,
    Subjects,
    up_stream,
)

CORE, RUNS, NODES = "core", "runs", "nodes"
MOST_REGIONS = 100
"""An account names what each region shares, and nats-server takes no JWT of more than 1 MiB."""
ANSWER_WITHIN_NS = 900 * 1_000_000_000
"""A fold worker may work so long for one answer."""


def region_account(region: str) -> str:
    return f"region-{region}"


def leaf_account(region: str) -> str:
    return f"leaf-{region}"


def hub_of(region: str, *, has_identity: bool = True) -> str:
    """The JetStream domain under which a region's nodes reach the hub, through the region's server."""
    return f"{HUB_DOMAIN}.{region}" if has_identity else HUB_DOMAIN


def streams_of(region: str, *, has_identity: bool = True) -> str:
    """The same, of the region's own streams. A server would take its domain's own name for an account's own streams."""
    return f"region.{region}" if has_identity else region


@dataclass(frozen=True, slots=True)
class Export:
    """A subject that other accounts may import. `many`: a request gets more than one answer."""

    subject: str
    kind: Literal["service", "stream"] = "service"
    many: bool = False

    def claims(self) -> dict[str, object]:
        about: dict[str, object] = {"name": self.subject, "subject": self.subject, "type": self.kind}
        if self.kind == "service":
            answers = "Stream" if self.many else "Singleton"
            about |= {"response_type": answers, "response_threshold": ANSWER_WITHIN_NS}
        return about


@dataclass(frozen=True, slots=True)
class Import:
    """What `account` exports; here it is called `local` (empty: the same)."""

    account: str
    subject: str
    kind: Literal["service", "stream"] = "service"
    local: str = ""

    def claims(self, public: str) -> dict[str, object]:
        local = {"local_subject": self.local} if self.local else {}
        return {"name": self.subject, "subject": self.subject, "account": public, "type": self.kind, **local}


@dataclass(frozen=True, slots=True)
class Account:
    """`clients` and `links`: how many may connect (-1: any number)."""

    exports: tuple[Export, ...] = ()
    imports: tuple[Import, ...] = ()
    jetstream: bool = False
    clients: int = -1
    links: int = 0


def accounts(subjects: Subjects, regions: Iterable[str]) -> Mapping[str, Account]:
    """Every account of an installation, by name."""
    names = sorted(regions)
    found = {CORE: _core(subjects, names), RUNS: _runs(subjects, names), NODES: _nodes(subjects, names)}
    for region in names:
        found[region_account(region)] = _region(subjects, region)
        found[leaf_account(region)] = _leaf(subjects, region)
    return found


def _core(subjects: Subjects, regions: list[str]) -> Account:
    exports = [Export(each) for each in _of_core(subjects, regions)]
    exports += [Export(each, many=True) for each in _pulls(regions)]
    exports += [Export(down_delivery(region, each), "stream") for region in regions for each in MIRRORED]
    exports += [Export(each, "stream") for each in _told_to_runs(subjects)]
    imports = [
        Import(region_account(r), each.subject, each.kind)
        for r in regions
        for each in _region(subjects, r).exports
        if each.subject != subjects.fold(r)
    ]
    imports.append(Import(RUNS, subjects.signing))
    return Account(tuple(exports), tuple(imports), jetstream=True)


def _of_core(subjects: Subjects, regions: list[str]) -> list[str]:
    for_regions = [each for region in regions for each in _asked_by_region(subjects, region)]
    return _widest([*for_regions, *_asked_by_runs(subjects, regions)])


def _widest(patterns: Iterable[str]) -> list[str]:
    """Without those that another one covers: a server takes no account that exports a subject twice."""
    found = list(dict.fromkeys(patterns))
    return [each for each in found if not any(covers(other, each) for other in found if other != each)]


def covers(wide: str, narrow: str) -> bool:
    """Whether every subject that `narrow` matches is matched by `wide`."""
    outer, inner = wide.split("."), narrow.split(".")
    for position, wanted in enumerate(outer):
        if wanted == ">":
            return len(inner) > position
        if position >= len(inner) or inner[position] == ">" or wanted not in ("*", inner[position]):
            return False
    return len(outer) == len(inner)


def _asked_by_region(subjects: Subjects, region: str) -> list[str]:
    consumer = mirror_consumer(region)
    return [
        *(f"$JS.API.CONSUMER.RESET.{stream}.{consumer}" for stream in MIRRORED),
        *(f"$JS.FC.{where}{stream}.{consumer}.>" for stream in MIRRORED for where in _BOTH_FORMS),
        *_read_by_region(subjects),
        subjects.enrolment(region, "*"),
        subjects.renewal(region, "*"),
        subjects.orders(region, "*"),
    ]


def _read_by_region(subjects: Subjects) -> list[str]:
    """What a region reads at the hub if its own server lacks it; only the cloud writes it."""
    kinds = (f"{RELEASES}.{subjects.all_releases}", *(f"{DOWN}.{subjects.root}.down.{k}.>" for k in ("blob", "round")))
    return [f"$JS.API.DIRECT.GET.{each}" for each in kinds]


def _asked_by_runs(subjects: Subjects, regions: list[str]) -> list[str]:
    root = subjects.root
    streams = [up_stream(region) for region in (HUB_REGION, *regions)]
    return [
        f"{root}.up.{HUB_REGION}.>",
        f"{root}.down.node.*.*.task.>",
        f"{root}.down.round.>",
        f"{root}.rel.new.>",
        f"{root}.ckpt.>",
        subjects.asked_by_run("*", "*"),
        *(f"$JS.API.DIRECT.GET.{stream}.>" for stream in (DOWN, RELEASES, CHECKPOINTS, *streams)),
        *(f"$JS.ACK.{where}{stream}.>" for stream in streams for where in _BOTH_FORMS),
    ]


def _pulls(regions: list[str]) -> list[str]:
    return [f"$JS.API.CONSUMER.MSG.NEXT.{up_stream(region)}.*" for region in regions]


def _told_to_runs(subjects: Subjects) -> list[str]:
    return [subjects.all_presence, subjects.order("*")]


def _runs(subjects: Subjects, regions: list[str]) -> Account:
    services = [*_asked_by_runs(subjects, regions), *_pulls(regions)]
    imports = [Import(CORE, each) for each in services]
    imports += [Import(CORE, each, "stream") for each in _told_to_runs(subjects)]
    for region in regions:
        reads = [f"$JS.{region}.API.DIRECT.GET.{stream}.>" for stream in (UP, STAY)]
        imports += [Import(region_account(region), each) for each in (*reads, subjects.fold(region))]
    return Account((Export(subjects.signing),), tuple(imports))


def _region(subjects: Subjects, region: str) -> Account:
    root = subjects.root
    exports = [
        Export(f"$JS.{region}.API.>", many=True),
        Export(f"{root}.cache.{region}.>"),
        *(Export(each) for each in _asked_of_nodes(subjects, region)),
        Export(subjects.fold(region)),
        # Without the domain in it, every region's would be the same.
        Export(f"$JS.FC.{region}.*.{UP}.>"),
        Export(f"{up_delivery(region)}.>", "stream"),
        Export(subjects.telemetry(region, "*"), "stream"),
    ]
    imports = [Import(CORE, each) for each in _asked_by_region(subjects, region)]
    imports += [Import(CORE, down_delivery(region, each), "stream") for each in MIRRORED]
    return Account(tuple(exports), tuple(imports), links=-1)


def _leaf(subjects: Subjects, region: str) -> Account:
    exports = [Export(subject, many=many) for subject, _, many in _asked_by_nodes(subjects, region)]
    exports.append(Export(f"{subjects.root}.live.node.{region}.>", "stream"))
    answered = (*_asked_of_nodes(subjects, region), subjects.fold(region))
    return Account(tuple(exports), tuple(Import(NODES, each) for each in answered), jetstream=True, links=-1)


def _asked_of_nodes(subjects: Subjects, region: str) -> tuple[str, ...]:
    return tuple(asked(region, "*", "*") for asked in (subjects.infer, subjects.samples, subjects.logs))


def _asked_by_nodes(subjects: Subjects, region: str) -> Iterator[tuple[str, str, bool]]:
    """Subject at the region's streams, what nodes call it (empty: the same), and whether many answers come."""
    root = subjects.root
    yield f"{root}.up.{region}.>", "", False
    yield f"{root}.stay.{region}.>", "", False
    yield subjects.telemetry(region, "*"), "", False
    yield subjects.enrolment(region, "*"), "", False
    yield subjects.renewal(region, "*"), "", False
    yield subjects.orders(region, "*"), "", False
    for stream in (DOWN, ORDERS, CACHE, UP, STAY):
        read = f"DIRECT.GET.{stream}.>"
        yield f"$JS.API.{read}", f"$JS.{streams_of(region)}.API.{read}", False
    yield f"$JS.API.DIRECT.GET.{STAY}", f"$JS.{streams_of(region)}.API.DIRECT.GET.{STAY}", True
    for at_hub in _read_by_region(subjects):
        verb = at_hub.removeprefix("$JS.API.")
        yield f"$JS.{HUB_DOMAIN}.API.{verb}", f"$JS.{hub_of(region)}.API.{verb}", False


def _nodes(subjects: Subjects, regions: list[str]) -> Account:
    imports = [
        Import(leaf_account(region), subject, local=local)
        for region in regions
        for subject, local, _ in _asked_by_nodes(subjects, region)
    ]
    imports += [Import(leaf_account(r), f"{subjects.root}.live.node.{r}.>", "stream") for r in regions]
    answers = (*_asked_of_nodes(subjects, "*"), subjects.fold("*"))
    return Account(tuple(Export(each) for each in answers), tuple(imports))


_BOTH_FORMS = ("", "*.*.")
"""What stands between `$JS.FC` or `$JS.ACK` and a stream: nothing, or domain and account (flag js_ack_fc_v2)."""
