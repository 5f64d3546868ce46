"""A roll-out as it is asked for, in a file or by options. Pure data."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from fedtide.fabric.plans.rollout_plan import Bake, Gate, OnFailure, Rate
from fedtide.fabric.plans.windows import Window
from fedtide.fabric.strict import Asked


class RolloutRequest(Asked):
    """What a person asks for, in a file or by options; the rest follows from the registry and the fleet."""

    model: str
    version: int | None = Field(default=None, ge=1, description="None: the latest release")
    regions: list[str | list[str]] = Field(default=[], description="In this order; those of an inner list together")
    selector: dict[str, str] = {}
    canary: float = Field(default=0.34, ge=0, description="Below 1 a share of each wave, else a number of nodes")
    canary_by: list[str] = Field(default=["hardware"], description="Canaries cover every value of these labels first")
    max_error: float = Field(default=0.0, ge=0, le=1, description="Failed / attempted")
    min_success: float | None = Field(default=None, ge=0, le=1, description="None: 1 - max_error")
    min_attempted: int = Field(default=1, ge=1)
    claim_deadline_s: float = Field(default=300.0, gt=0, description="Nodes that do not answer by then leave the wave")
    finish_deadline_s: float = Field(default=900.0, gt=0, description="Nodes that answered must be done by then")
    cache_deadline_s: float = Field(default=3600.0, gt=0)
    bake: Bake = Bake()
    gates: list[Gate] = []
    on_inconclusive: Literal["wait", "pause"] = "wait"
    gate_deadline_s: float = Field(default=86_400.0, gt=0)
    approve: list[str] = Field(default=[], description="Regions that need approval to begin; `canary`: after canaries")
    rate: Rate = Rate()
    catch_up_in_flight: int = Field(default=10, ge=1)
    window: Window | None = None
    on_failure: OnFailure = "rollback_all"
    node_bytes_per_s: int | None = Field(default=None, ge=1)
    region_bytes_per_s: int | None = Field(default=None, ge=1)
    new_interface: bool = False
    holdout: int | None = Field(default=None, ge=0)
    shadow: float | None = Field(default=None, ge=0, le=1)
    report_s: float = Field(default=10.0, gt=0)
