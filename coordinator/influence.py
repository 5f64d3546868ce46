"""What a node's updates have influenced, and what to go back to without them. Pure.

A release is influenced if its run has counted an update of the node, or if it began from one that is. Runs that were
removed say nothing any more; of a run that began from the arrays of another run, nothing tells from which.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from fedtide.coordinator.models.registry import Model, Release
from fedtide.coordinator.runs import rounds, runs
from fedtide.coordinator.state import World
from fedtide.fabric.messages.views import ContributionView, InfluencedView, InfluenceView, ProposalView, ServedView
from fedtide.fabric.tensors.blobs import BlobRef


def of_node(world: World, node: str) -> InfluenceView:
    """Raises NotFound: there is no such node, and no run has counted an update of it."""
    found = contributions(world, node)
    if not found:
        world.node(node)
    through = _influenced(world, found)
    tainted = {ref: why for ref, why in through.items() if why}
    return InfluenceView(
        node=node,
        contributions=[
            ContributionView(run=key, rounds=numbers, model=world.runs[key].facts.spec.model or "")
            for key, numbers in found.items()
        ],
        releases=[
            InfluencedView(model=m.name, version=r.manifest.version, through=tainted[r.ref])
            for m in world.models.values()
            for r in m.releases
            if r.ref in tainted
        ],
        served=list(_served(world, tainted)),
        proposals=[_proposal(world, m, tainted, found) for m in world.models.values() if _concerns(m, tainted)],
    )


def contributions(world: World, node: str) -> dict[str, list[int]]:
    """By run, the rounds in which an update of the node counts."""
    found = {}
    for key, run in world.runs.items():
        numbers = [n for n, r in sorted(run.rounds.items()) if _counts(r, node)]
        if numbers:
            found[key] = numbers
    return found


def _counts(round_: rounds.Round, node: str) -> bool:
    tally = round_.phases.get("train")
    return tally is not None and node in tally.received and not isinstance(round_, rounds.Abandoned)


def _influenced(world: World, found: Mapping[str, list[int]]) -> dict[BlobRef, str]:
    """Every release, with how the node's updates came into it; empty: they did not."""
    releases = sorted((r for m in world.models.values() for r in m.releases), key=lambda r: r.manifest.version)
    through: dict[BlobRef, str] = {}
    for _ in range(len(releases) + 1):  # a release may begin from one of another model
        before = dict(through)
        for release in releases:
            through[release.ref] = _why(release, found, through)
        if through == before:
            break
    return through


def _why(release: Release, found: Mapping[str, list[int]], through: Mapping[BlobRef, str]) -> str:
    lineage = release.manifest.lineage
    if lineage.run in found:
        return lineage.run
    return f"its base, {lineage.base.digest[:12]}" if lineage.base is not None and through.get(lineage.base) else ""


def _concerns(model: Model, tainted: Mapping[BlobRef, str]) -> bool:
    return any(r.ref in tainted for r in model.releases)


def _served(world: World, tainted: Mapping[BlobRef, str]) -> Iterator[ServedView]:
    versions = {r.ref: (m.name, r.manifest.version) for m in world.models.values() for r in m.releases}
    for model, serving in sorted(world.serving.items()):
        for name, ref in sorted(serving.items()):
            if ref in tainted:
                yield ServedView(node=name, model=model, version=versions[ref][1])


def _proposal(
    world: World, model: Model, tainted: Mapping[BlobRef, str], found: Mapping[str, list[int]]
) -> ProposalView:
    clean = next((r for r in reversed(model.releases) if r.ref not in tainted), None)
    serving: Mapping[str, BlobRef] = world.serving.get(model.name, {})
    first = next(r for r in model.releases if r.ref in tainted)
    run, app = first.manifest.lineage.run, first.manifest.lineage.app.name
    base = _base(world, run, found, clean)
    needed = any(ref in tainted for ref in serving.values())
    return ProposalView(
        model=model.name,
        roll_back_to=clean.manifest.version if clean is not None else None,
        roll_back=[f"fedtide rollout start {model.name} --version {clean.manifest.version}"]
        if clean is not None and needed
        else [],
        retrain_from=base,
        retrain=f"fedtide run start --app {app} --model {model.name}" + (f" --base {base}" if base else ""),
    )


def _base(world: World, run: str, found: Mapping[str, list[int]], clean: Release | None) -> str:
    """The last round before the node's first update, if its model is kept; else the last release without it."""
    state = world.runs.get(run)
    if state is not None and run in found:
        before = [n for n, r in state.rounds.items() if isinstance(r, rounds.Closed) and 0 < n < found[run][0]]
        if before and not (isinstance(state, runs.Ended) and state.outcome == "completed"):
            return f"{run}/{max(before)}"
    return str(clean.manifest.version) if clean is not None else ""
