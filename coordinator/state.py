"""The coordinator's whole state: tables of aggregates, each immutable. It changes only through `reducers`. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, MutableMapping
from datetime import datetime
from typing import TypeVar

from immutables import Map

from fedtide.coordinator.commands import CancelRun, Commands, SetAlarm
from fedtide.coordinator.drafts import Draft
from fedtide.coordinator.fleet import fleet, forecast
from fedtide.coordinator.identity import epochs, identities, people, tenants, trust
from fedtide.coordinator.ledger import accounts, anomalies, budgets, valuation
from fedtide.coordinator.models import registry
from fedtide.coordinator.rollouts import rollouts
from fedtide.coordinator.runs import runs
from fedtide.coordinator.triggers import triggers
from fedtide.fabric.errors import NotFound
from fedtide.fabric.messages.tenants import Quota
from fedtide.fabric.plans.prices import PriceBook
from fedtide.fabric.tensors.blobs import BlobRef

T = TypeVar("T")

_TABLES = (
    "nodes",
    "runs",
    "models",
    "rollouts",
    "triggers",
    "last_asked",
    "serving",
    "ledger",
    "budgets",
    "hourly",
    "free",
)
_SINGLE = ("identities", "epoch", "trust", "people", "tenants", "quota", "valuer", "hour", "metered")
"""What is one immutable thing."""
UNLIMITED = Quota(bytes=None)


class World:
    """Everything the log says, as of one event."""

    def __init__(self) -> None:
        self.nodes: MutableMapping[str, fleet.Node] = {}
        self.runs: MutableMapping[str, runs.Run] = {}
        self.models: MutableMapping[str, registry.Model] = {}
        self.rollouts: MutableMapping[str, rollouts.Rollout] = {}
        self.triggers: MutableMapping[str, triggers.Trigger] = {}
        self.last_asked: MutableMapping[str, datetime] = {}
        """When each node was asked to train last, by whatever run."""
        self.serving: MutableMapping[str, Map[str, BlobRef]] = {}
        """By model and node: the release that the node confirmed last."""
        self.ledger: MutableMapping[str, accounts.Account] = {}
        """By run or roll-out; `accounts.NOBODY`: what was used for none."""
        self.budgets: MutableMapping[str, budgets.Kept] = {}
        self.valuer = valuation.Valuer(PriceBook())
        self.hourly: MutableMapping[str, anomalies.Hours] = {}
        """By `model/NAME` and `region/NAME`: what it has cost in each of the last hours."""
        self.free: MutableMapping[str, forecast.Shares] = {}
        """By region: when its nodes were there and idle."""
        self.metered = ""
        """The id of the last report of what no other event tells."""
        self.hour = 0
        """The newest hour in the ledger, since 1970."""
        self.identities = identities.Identities()
        self.epoch = epochs.Epoch()
        self.trust = trust.Trust()
        self.people = people.People()
        self.tenants: dict[str, tenants.Tenant] = {}
        """Those that are served beside this one, by name; replaced, never changed."""
        self.quota = UNLIMITED
        """What this tenant may use; an installation's own has no limit."""
        self._below: World | None = None

    def draft(self) -> World:
        """The same state, to be changed: nothing of it counts before `commit`."""
        twin = World()
        for name, table in self._tables():
            setattr(twin, name, Draft(table))
        self._share(twin)
        twin._below = self
        return twin

    def commit(self) -> None:
        """Make the changes of this draft to the state it was made from."""
        assert self._below is not None, "only a draft has changes to commit"
        for _, table in self._tables():
            table.commit()  # type: ignore[attr-defined]  # those of a draft are drafts
        self._share(self._below)

    def copy(self) -> World:
        """The same state, apart from this one: aggregates are immutable, so only the tables are copied."""
        twin = World()
        for name, table in self._tables():
            setattr(twin, name, dict(table))
        self._share(twin)
        return twin

    def _share(self, other: World) -> None:
        for name in _SINGLE:
            setattr(other, name, getattr(self, name))

    @property
    def prices(self) -> PriceBook:
        return self.valuer.book

    @prices.setter
    def prices(self, book: PriceBook) -> None:
        self.valuer = valuation.Valuer(book)

    def _tables(self) -> Iterator[tuple[str, MutableMapping[str, object]]]:
        return ((name, getattr(self, name)) for name in _TABLES)

    def pending_commands(self) -> Iterator[Commands]:
        """What the state as a whole still wants done, after a restart."""
        for run in self.runs.values():
            yield runs.pending_commands(run)
        for model in self.models.values():
            yield registry.pending_commands(model)
        for rollout in self.rollouts.values():
            yield rollouts.pending_commands(rollout)
            yield self.withdrawn(rollout)
        for trigger in self.triggers.values():
            yield triggers.pending_commands(trigger)
        yield identities.pending_commands(self.identities)

    def is_asked_for(self, rule: str, key: str) -> bool:
        """Whether a rule still wants to start `key` (and was not replaced, removed or answered meanwhile)."""
        trigger = self.triggers.get(rule)
        return trigger is not None and any(f.started == key for f in trigger.asked)

    def withdrawn(self, rollout: rollouts.Rollout) -> Commands:
        """Cancel the runs that train from a release that was rolled back."""
        if not isinstance(rollout, rollouts.RolledBack):
            return ()
        release, name = rollout.facts.plan.release, rollout.facts.rollout
        reason = f"its base was withdrawn: {name} was rolled back"
        return tuple(
            CancelRun(key, reason)
            for key, run in self.active_runs()
            if run.facts.spec.base == release
            and run.facts.spec.purpose == "train"
            and run.facts.requested_at <= rollout.at
        )

    def wants_alarm(self, owner: str, id: str, key: str) -> bool:
        """Whether the state still waits for this alarm."""
        if owner == "rollout":
            return id in self.rollouts and rollouts.wants_alarm(self.rollouts[id], key)
        commands = runs.pending_commands(self.runs[id]) if id in self.runs else ()
        return any(isinstance(c, SetAlarm) and c.key == key for c in commands)

    def tasks_of_others(self, run: str) -> Counter[str]:
        """How many tasks each node has of runs other than `run`."""
        return Counter(n for key, other in self.active_runs() if key != run for n in runs.awaited(other))

    def active_runs(self) -> Iterator[tuple[str, runs.Run]]:
        return ((key, run) for key, run in self.runs.items() if not isinstance(run, runs.Ended))

    def members(self) -> list[fleet.Node]:
        """The nodes that may be asked for anything: those whose credentials were not revoked."""
        return [node for name, node in self.nodes.items() if not identities.is_revoked(self.identities, name)]

    def run(self, key: str) -> runs.Run:
        return _find(self.runs, key, "run")

    def node(self, key: str) -> fleet.Node:
        return _find(self.nodes, key, "node")

    def model(self, key: str) -> registry.Model:
        return _find(self.models, key, "model")

    def rollout(self, key: str) -> rollouts.Rollout:
        return _find(self.rollouts, key, "roll-out")

    def trigger(self, key: str) -> triggers.Trigger:
        return _find(self.triggers, key, "trigger")

    def budget(self, key: str) -> budgets.Kept:
        return _find(self.budgets, key, "budget")

    def release_of(self, run: str) -> registry.Release | None:
        """The release that a run produced, once it is published."""
        releases = (r for m in self.models.values() for r in m.releases)
        return next((r for r in releases if r.manifest.lineage.run == run), None)

    def attestation_of(self, release: BlobRef) -> BlobRef | None:
        """Who vouches for a release, if anybody does."""
        found = (r.attestation for m in self.models.values() for r in m.releases if r.ref == release)
        return next(found, None)

    def has_region(self, name: str) -> bool:
        """Whether a region of this name has nodes, or had credentials."""
        return name in self.identities.regions or any(node.region == name for node in self.nodes.values())

    def served_by(self, model: str) -> dict[int, int]:
        """How many nodes serve each version of a model; those that most serve first."""
        counts = Counter(ref.digest for ref in self.serving.get(model, {}).values())
        versions = {r.ref.digest: r.manifest.version for r in self.model(model).releases} if counts else {}
        return {versions[digest]: count for digest, count in counts.most_common() if digest in versions}

    def current(self, model: str) -> registry.Release | None:
        """What a new release has to be better than: that which is being rolled out, else that most nodes serve."""
        of_model = [r for r in self.rollouts.values() if r.facts.plan.model == model and rollouts.is_open(r)]
        newest = max(of_model, key=lambda r: r.facts.started_at, default=None)
        if newest is None:
            return self.served_by_most(model)
        version = newest.facts.plan.version
        return next((r for r in self.model(model).releases if r.manifest.version == version), None)

    def served_by_most(self, model: str) -> registry.Release | None:
        """The release of a model that most nodes serve, if any does."""
        most = next(iter(self.served_by(model)), 0)
        return next((r for r in self.model(model).releases if r.manifest.version == most), None) if most else None

    def is_publishing(self, run: str) -> bool:
        """Whether the model that a run produced is not published as a release yet."""
        return any(produced.run == run for m in self.models.values() for produced, _ in m.producing)


def _find(table: Mapping[str, T], key: str, what: str) -> T:
    found = table.get(key)
    if found is None:
        near = ", ".join(sorted(table)[:8]) or "none yet"
        raise NotFound(f"there is no {what} {key!r}", f"Known: {near}")
    return found
