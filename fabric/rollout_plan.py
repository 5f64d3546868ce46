"""What a roll-out is to do, and the phases a node goes through with it. Pure."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from fabric.blobs import BlobRef
from fabric.wire import Strict

NodePhase = Literal[
    "offered",
    "downloading",
    "verified",
    "staged",
    "smoke_tested",
    "active",
    "confirmed",
    "failed",
    "rolled_back",
    "rejected",
    "timed_out",
    "superseded",
]


class WavePlan(Strict):
    """One region's share of a roll-out, canaries first."""

    region: str
    canaries: list[str]
    nodes: list[str] = Field(description="The rest of the cohort, after its canaries")


class RolloutPlan(Strict):
    model: str
    release: BlobRef
    version: int
    previous: dict[str, BlobRef] = Field(default={}, description="What each node goes back to; absent: nothing")
    waves: list[WavePlan] = Field(min_length=1)
    max_error: float = Field(default=0.0, ge=0, le=1)
    min_success: float = Field(default=1.0, ge=0, le=1)
    min_attempted: int = Field(default=1, ge=1)
    claim_deadline_s: float = Field(default=300.0, gt=0)
