"""The model registry: every model's releases, in order, and its desired-state counter.

Pure. Versions count from 1 and are assigned when a model is produced. The counter only grows: by two for
each roll-out and for each retry, one for the offer and one reserved for the rollback.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from fedtide.coordinator.commands import Commands, PublishRelease
from fedtide.fabric.events.envelope import ModelProduced, ReleaseAttested, ReleasePublished
from fedtide.fabric.events.rollouts import RolloutRetryRequested, RolloutStarted
from fedtide.fabric.plans.release import ReleaseManifest
from fedtide.fabric.tensors.blobs import BlobRef

ModelEvent = ModelProduced | ReleasePublished | ReleaseAttested | RolloutStarted | RolloutRetryRequested


@dataclass(frozen=True, slots=True)
class Release:
    """`attestation`: its provenance with the signatures of those who vouch for it; None: nobody has yet."""

    ref: BlobRef
    manifest: ReleaseManifest
    attestation: BlobRef | None = None


@dataclass(frozen=True, slots=True)
class Model:
    """`producing`: models that runs have produced and that are not published yet, each with its version."""

    name: str
    releases: tuple[Release, ...] = ()
    producing: tuple[tuple[ModelProduced, int], ...] = ()
    counter: int = 0

    @property
    def latest(self) -> Release | None:
        return self.releases[-1] if self.releases else None


def step(state: Model, event: ModelEvent) -> tuple[Model, Commands]:
    match event:
        case ModelProduced(run=run):
            if run in _runs(state):
                return state, ()
            version = len(state.releases) + len(state.producing) + 1
            return replace(state, producing=(*state.producing, (event, version))), (PublishRelease(event, version),)
        case ReleaseAttested(release=ref, attestation=attestation):
            signed = (replace(r, attestation=attestation) if r.ref == ref else r for r in state.releases)
            return replace(state, releases=tuple(signed)), ()
        case ReleasePublished(release=ref, manifest=manifest, attestation=attestation):
            if any(r.ref == ref for r in state.releases):
                return state, ()
            left = tuple(p for p in state.producing if p[0].run != manifest.lineage.run)
            releases = sorted((*state.releases, Release(ref, manifest, attestation)), key=lambda r: r.manifest.version)
            return replace(state, releases=tuple(releases), producing=left), ()
        case RolloutStarted(counter=counter) | RolloutRetryRequested(counter=counter):
            return replace(state, counter=max(state.counter, counter + 1)), ()


def _runs(state: Model) -> set[str]:
    return {p.run for p, _ in state.producing} | {r.manifest.lineage.run for r in state.releases}


def pending_commands(state: Model) -> Commands:
    return tuple(PublishRelease(produced, version) for produced, version in state.producing)
