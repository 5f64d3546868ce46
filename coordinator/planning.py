"""How a roll-out plan comes from a fleet: waves in region order, canaries by stable hash. Pure."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping

from pydantic import Field

from coordinator.fleet import Node, matches
from coordinator.registry import Model, Release
from fabric.blobs import BlobRef
from fabric.errors import ConfigError, NotFound
from fabric.rollout_plan import RolloutPlan, WavePlan
from fabric.wire import Strict


class RolloutRequest(Strict):
    """What a person asks for; everything else follows from the registry and the fleet."""

    model: str
    version: int | None = Field(default=None, ge=1, description="None: the latest release")
    regions: list[str] = Field(default=[], description="In this order; empty: all, by name")
    selector: dict[str, str] = {}
    canary: float = Field(default=0.34, ge=0, le=1, description="Fraction of the first wave that goes first")
    max_error: float = Field(default=0.0, ge=0, le=1)
    min_success: float | None = Field(default=None, ge=0, le=1, description="None: 1 - max_error")
    claim_deadline_s: float = Field(default=300.0, gt=0)


def plan(request: RolloutRequest, model: Model, fleet: Iterable[Node], serving: Mapping[str, BlobRef]) -> RolloutPlan:
    """The plan of a roll-out.

    Args:
        serving: what nodes serve of this model now; on failure each goes back to it, or stops serving.

    Raises:
        NotFound: no such release, or no node in the cohort.
        ConfigError: a region without nodes.
    """
    release = _release(request, model)
    nodes = [n for n in fleet if matches(n, request.selector)]
    known = sorted({n.region for n in nodes})
    for region in request.regions:
        if region not in known:
            raise ConfigError(f"--regions {region}", "no node of the cohort is in this region", f"Known: {known}")
    regions = request.regions or known
    if not regions:
        raise NotFound("no node belongs to the cohort", "See `fedtide fleet ls`")
    waves = [_wave(i, region, nodes, request, release.ref.digest) for i, region in enumerate(regions)]
    return RolloutPlan(
        model=model.name,
        release=release.ref,
        version=release.manifest.version,
        previous={n.name: serving[n.name] for n in nodes if n.name in serving},
        waves=waves,
        max_error=request.max_error,
        min_success=request.min_success if request.min_success is not None else 1.0 - request.max_error,
        claim_deadline_s=request.claim_deadline_s,
    )


def _release(request: RolloutRequest, model: Model) -> Release:
    wanted = request.version or len(model.releases)
    for release in model.releases:
        if release.manifest.version == wanted:
            return release
    raise NotFound(f"model {request.model!r} has no release {wanted or ''}".strip(), "See `fedtide model ls`")


def _wave(index: int, region: str, nodes: list[Node], request: RolloutRequest, salt: str) -> WavePlan:
    # Nodes that are there come first: a canary that is away would only hold the wave up.
    cohort = sorted((n for n in nodes if n.region == region), key=lambda n: (not n.online, _rank(salt, n.name)))
    names = [n.name for n in cohort]
    count = math.ceil(len(names) * request.canary) if index == 0 else 0
    return WavePlan(region=region, canaries=names[:count], nodes=sorted(names[count:]))


def _rank(salt: str, node: str) -> str:
    return hashlib.sha256(f"{salt}/{node}".encode()).hexdigest()
