"""A roll-out as it is asked for, in a file or by options. Pure data."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from fedtide.fabric.plans.rollout_plan import Bake, Gate, OnFailure, Rate
from fedtide.fabric.plans.windows import Window
from fedtide.fabric.strict import Request


class RolloutRequest(Request):
    """What a person asks for, in a file or by options; the rest follows from the registry and the fleet."""

    model: str = Field(description="Registry name of the model")
    version: int | None = Field(default=None, ge=1, description="None: the latest release")
    regions: list[str | Annotated[list[str], Field(min_length=1)]] = Field(
        default=[], description="In this order; those of an inner list together"
    )
    selector: dict[str, str] = Field(default={}, description="Labels that a node must have")
    canary: float = Field(default=0.34, ge=0, description="Below 1 a share of each wave, else a number of nodes")
    canary_by: list[str] = Field(default=["hardware"], description="Canaries cover every value of these labels first")
    max_error: float = Field(default=0.0, ge=0, le=1, description="Failed / attempted")
    min_success: float | None = Field(default=None, ge=0, le=1, description="None: 1 - max_error")
    min_attempted: int = Field(default=1, ge=1, description="Success is judged once so many nodes have tried")
    claim_deadline_s: float = Field(default=300.0, gt=0, description="Nodes that do not answer by then leave the wave")
    finish_deadline_s: float = Field(default=900.0, gt=0, description="Nodes that answered must be done by then")
    cache_deadline_s: float = Field(default=3600.0, gt=0, description="A region must hold the release by then")
    bake: Bake = Field(default=Bake(), description="How long a stage is watched before the next")
    gates: list[Gate] = Field(default=[], description="What must hold before the next stage begins")
    on_inconclusive: Literal["wait", "pause"] = Field(default="wait", description="What a gate that cannot decide does")
    gate_deadline_s: float = Field(
        default=86_400.0, gt=0, description="A gate that cannot decide by then asks a person"
    )
    approve: list[str] = Field(default=[], description="Regions that need approval to begin; `canary`: after canaries")
    rate: Rate = Field(default=Rate(), description="How fast the nodes of a stage are offered the release")
    catch_up_in_flight: int = Field(
        default=10, ge=1, description="Nodes that missed their wave: offered to so many at once"
    )
    window: Window | None = Field(default=None, description="When nodes may activate it; none: at any time")
    on_failure: OnFailure = Field(default="rollback_all", description="What is taken back when a stage fails")
    node_bytes_per_s: int | None = Field(default=None, ge=1, description="Download limit of each node")
    region_bytes_per_s: int | None = Field(
        default=None, ge=1, description="Download limit of each region's nodes together"
    )
    new_interface: bool = Field(default=False, description="Inputs and outputs may differ from those served now")
    holdout: int | None = Field(
        default=None,
        ge=0,
        description="Recent labelled samples that both releases are scored on; none: as the gates need",
    )
    shadow: float | None = Field(
        default=None,
        ge=0,
        le=1,
        description="Share of requests that the incumbent answers as well; none: as the gates need",
    )
    report_s: float = Field(default=10.0, gt=0, description="Seconds between reports of a node's measurements")
