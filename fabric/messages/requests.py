"""Bodies of API requests, apart from runs, roll-outs and rules (`fabric.plans`). Pure data."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AwareDatetime, Field

from fedtide.fabric.strict import Request, Strict

LONGEST_TTL_S = 30 * 86_400

RolloutActionName = Literal["abort", "rollback", "pause", "resume", "promote", "next", "retry"]
"""What a person may do with a roll-out."""
RunActionName = Literal["cancel", "pause", "resume", "stop"]
"""What a person may do with a run."""


class ActionRequest(Request):
    """`reason` is shown with the run or roll-out."""

    reason: str = Field(default="asked by a person", max_length=1000)
    region: str = Field(default="", description="Of a promotion; empty: every region that waits")


class TokenRequest(Request):
    """`region` empty: any."""

    region: str = ""
    uses: int = Field(default=1, ge=1, le=100_000)
    ttl_s: float = Field(default=3600.0, gt=0, le=LONGEST_TTL_S)
    replaces: bool = False


class RevokeRequest(Request):
    reason: str = Field(default="", max_length=1000)


class QuarantineRequest(Request):
    """Ask a node to train no more; with `lift`: again."""

    reason: str = Field(default="", max_length=1000)
    lift: bool = False


class AttestationRequest(Request):
    """The statement of a release, with the signatures of those who vouch for it (a DSSE envelope, JSON)."""

    envelope: str = Field(max_length=2 << 20)


class RegionRequest(Request):
    """Names under which nodes reach the region's leaf; with `rotates` the credentials before are withdrawn at once."""

    rotates: bool = False
    hosts: list[Annotated[str, Field(pattern=r"^(\*\.)?[A-Za-z0-9]([A-Za-z0-9.:-]{0,252})$")]] = []


Label = (
    Annotated[int, Field(strict=True, gt=-(2**63), lt=2**63)]
    | Annotated[float, Field(strict=True, allow_inf_nan=False)]
    | Annotated[str, Field(strict=True)]
)
LabelValue = Label | Annotated[list[Label], Field(min_length=1)]


class LabelsRequest(Request):
    """Labels of samples by request id."""

    labels: dict[str, LabelValue]


class ForgetRequest(Request):
    """Which samples of a model are deleted: one, those before a time, or all."""

    id: str | None = None
    before: AwareDatetime | None = None


class SamplesQuestion(Strict):
    """A request about a node's samples: label some, delete some, or (neither is set) count them."""

    label: LabelsRequest | None = None
    forget: ForgetRequest | None = None
