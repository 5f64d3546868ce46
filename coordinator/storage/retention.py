"""What of the stored bytes the state still needs. Everything else may go, and nothing goes by its age. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta

from fedtide.coordinator.runs import runs
from fedtide.coordinator.state import World
from fedtide.fabric.errors import MalformedMessage
from fedtide.fabric.nats.subjects import FOLD_WORKER, LOG_OF, OrderFor, Report, Stored, parse, stored
from fedtide.fabric.plans.run_spec import AppRef
from fedtide.fabric.plans.trigger_rule import StartRun
from fedtide.fabric.tensors.blobs import BlobRef

SPARED = timedelta(days=1)
"""What a run may go on from is swept later than that is refused: nobody is in between."""


@dataclass(frozen=True, slots=True)
class Needed:
    """By name: runs that are not over or may go on, bundles that one, a release or a rule names, releases' blobs."""

    runs: frozenset[str]
    bundles: frozenset[str]
    releases: frozenset[str]
    logs: frozenset[str] = frozenset()
    """Runs whose log is kept."""
    nodes: frozenset[str] = frozenset()
    snapshot: str = ""
    members: frozenset[str] | None = None
    """Nodes that are let in; None: nobody has an identity."""

    def lets_in(self, node: str) -> bool:
        return self.members is None or node in self.members


@dataclass(frozen=True, slots=True)
class Garbage:
    """Messages below `pattern` that nobody needs; `digest`: a blob that somebody may be about to need."""

    pattern: str
    """A whole subject, or one that ends with `>`."""
    reason: str
    messages: int
    digest: str = ""


def needed(world: World, at: datetime, snapshot: str = "", *, members_only: bool = False) -> Needed:
    """What the state needs at a time, and the snapshot of it."""
    active = {key: run for key, run in world.runs.items() if runs.is_kept(run, at - SPARED)}
    publishing = {produced.run for m in world.models.values() for produced, _ in m.producing}
    releases = [release for m in world.models.values() for release in m.releases]
    apps = [run.facts.spec.app for run in active.values()]
    starts = [run.facts.spec.start for run in active.values()]
    apps += [release.manifest.lineage.app for release in releases]
    for trigger in world.triggers.values():
        action = trigger.rule.do
        if isinstance(action, StartRun) and action.app is not None:
            apps.append(action.app)
    blobs: list[BlobRef] = []
    for release in releases:
        blobs += [*release.manifest.served, release.manifest.arrays, release.ref]
        blobs += [release.attestation] if release.attestation is not None else []
    return Needed(
        runs=frozenset(active) | publishing,
        logs=frozenset(key for key, run in world.runs.items() if runs.has_ended_since(run, at - runs.RESUMABLE_FOR)),
        bundles=frozenset([*_blobs_of(apps), *(s.digest for s in starts if s is not None)]),
        releases=frozenset(ref.digest for ref in blobs),
        nodes=frozenset(world.nodes),
        snapshot=snapshot,
        members=frozenset(node.name for node in world.members()) if members_only else None,
    )


def _blobs_of(apps: Iterable[AppRef]) -> Iterator[str]:
    for app in apps:
        yield app.bundle.digest
        yield from (wheel.digest for wheel in app.wheels.values())


def garbage(subjects: Mapping[str, int], needs: Needed) -> list[Garbage]:
    """What may be deleted of the messages that `subjects` counts, a line for each whole thing."""
    found: dict[str, Garbage] = {}
    for subject, count in subjects.items():
        about = stored(subject)
        reason = _why_not_needed(subject, about, needs)
        if reason is None:
            continue
        pattern = f"{about.prefix}.>" if about is not None and about.prefix != subject else subject
        by_digest = about.digest if about is not None and not about.run else ""
        before = found.get(pattern)
        found[pattern] = Garbage(pattern, reason, count + (before.messages if before is not None else 0), by_digest)
    return sorted(found.values(), key=lambda each: each.pattern)


def _why_not_needed(subject: str, about: Stored | None, needs: Needed) -> str | None:
    match about:
        case None:
            return _why_not_known(subject, needs)
        case Stored("bundle", digest=digest):
            return None if digest in needs.bundles else "an app that no run, release or rule names"
        case Stored("release", digest=digest):
            return None if digest in needs.releases else "of no release in the registry"
        case Stored("reference", digest=digest):
            known = any(each.startswith(digest) for each in needs.releases)
            return None if known else "what drift of a forgotten release was measured against"
        case Stored("snapshot", digest=digest):
            return None if digest == needs.snapshot else "a snapshot that was replaced"
        case Stored("checkpoint", run=run) if run.removesuffix(LOG_OF) in needs.logs and run.endswith(LOG_OF):
            return None
        case Stored(run=run) if run not in needs.runs:
            return f"of run {run}, which is over or unknown"
        case Stored(node=node) if node not in ("", FOLD_WORKER, about.run) and not needs.lets_in(node):
            return f"of node {node}, which is not let in"
        case _:
            return None


def _why_not_known(subject: str, needs: Needed) -> str | None:
    try:
        found = parse(subject)
    except MalformedMessage:
        return "nothing that anybody stores"
    if isinstance(found, OrderFor) and found.kind == "desired" and found.node not in needs.nodes:
        return f"of node {found.node}, which was removed"
    return None


def largest_holders(subjects: Iterable[tuple[str, int]], at_most: int = 3) -> list[tuple[str, int]]:
    """The nodes with the most messages in a stream of what comes up, most first."""
    counts: Counter[str] = Counter()
    for subject, count in subjects:
        about = stored(subject)
        counts[about.node if about is not None and about.node else _sender(subject)] += count
    counts.pop("", None)
    return counts.most_common(at_most)


def _sender(subject: str) -> str:
    try:
        found = parse(subject)
    except MalformedMessage:
        return ""
    return found.node if isinstance(found, Report) else ""
