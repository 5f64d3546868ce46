"""What a roll-out is to do, and the phases a node goes through with it. Pure."""

from __future__ import annotations

from string import Template
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from fedtide.fabric.ids import NAME
from fedtide.fabric.plans.windows import Window
from fedtide.fabric.strict import Message, Strict, Tagged
from fedtide.fabric.tensors.blobs import BlobRef

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


class Terms(Strict):
    """How a node is to take a release."""

    bytes_per_s: int | None = Field(default=None, ge=1, description="Download limit of this node; None: none")
    window: Window | None = Field(default=None, description="When it may activate it; None: at any time")
    new_interface: bool = Field(default=False, description="Inputs and outputs may be others than those served now")
    measure: bool = Field(default=False, description="Count inferences and errors, and report them")
    watch_s: float = Field(default=86_400.0, gt=0, description="It is measured for no longer than this")
    holdout: int = Field(default=0, ge=0, description="Recent labelled samples that both releases are scored on")
    shadow: float = Field(default=0.0, ge=0, le=1, description="Share of requests that the incumbent answers as well")
    report_s: float = Field(default=10.0, gt=0, description="Seconds between two reports of what was measured")


class Desired(Message):
    """What one node should serve for one model. The highest `order` wins; lower ones are refused.

    `generation` is that of the coordinator's log: counters begin lower again when that was put back.
    """

    model: str = Field(pattern=NAME)
    counter: int = Field(ge=1)
    rollout: str
    release: BlobRef | None = Field(description="The release manifest, or None: serve nothing")
    expires_at: float | None = Field(default=None, description="Unix seconds after which the offer expires")
    terms: Terms = Terms()
    generation: int = Field(default=0, ge=0)
    attestation: BlobRef | None = Field(default=None, description="Of the release: who vouches for it")

    @property
    def order(self) -> tuple[int, int]:
        return self.generation, self.counter


class Bake(Strict):
    """How long a stage is watched before the next: both must be reached."""

    seconds: float = Field(default=0.0, ge=0, description="Minimum time")
    inferences: int = Field(default=0, ge=0, description="Answered with the release, over all nodes of the stage")


class Rate(Strict):
    """How fast the nodes of a stage are offered the release."""

    per_minute: float | None = Field(default=None, gt=0, description="Base rate, nodes a minute; None: no limit")
    growth: float = Field(default=1.0, ge=1, description="The rate grows by this factor with every confirmed node")
    most_per_minute: float = Field(default=10_000.0, gt=0, description="Limit of the growing rate")
    in_flight: int = Field(default=100, ge=1, description="Nodes that have been offered it and are not done")


class _Gate(Tagged):
    """`enforce` false: shown, but without effect. `alpha` is the chance of a wrong pass, and of a wrong fail."""

    enforce: bool = Field(default=True, description="False: it is shown, and decides nothing")
    alpha: float = Field(default=0.01, gt=0, lt=0.5, description="Probability of a wrong pass, and of a wrong fail")


class PairedGate(_Gate):
    """Candidate against incumbent on the node's own recent labelled samples: wins, losses, ties.

    The difference in accuracy must be shown to be above `-tolerance`, in every slice above `-slice_tolerance`.
    """

    kind: Literal["paired"] = "paired"
    tolerance: float = Field(default=0.02, ge=0, lt=1, description="Accuracy that the candidate may lose")
    slices: list[str] = Field(default=[], description="Labels of nodes, e.g. hardware")
    slice_tolerance: float = Field(default=0.05, ge=0, lt=1, description="Accuracy that it may lose in one slice")


class DisagreementGate(_Gate):
    """Share of requests that candidate and incumbent answer differently, by shadow inference."""

    kind: Literal["disagreement"] = "disagreement"
    most: float = Field(default=0.1, gt=0, lt=1, description="Maximum share of different answers")
    slices: list[str] = Field(default=[], description="Labels of nodes, e.g. hardware")
    slice_most: float = Field(default=0.2, gt=0, lt=1, description="Maximum share in one slice")


class LatencyGate(_Gate):
    """Fewer than half of the shadowed requests may take `SLOWER` times as long as with the incumbent."""

    kind: Literal["latency"] = "latency"


class InferenceErrorGate(_Gate):
    """Share of requests on which the candidate fails although the input is valid."""

    kind: Literal["errors"] = "errors"
    most: float = Field(default=0.01, gt=0, lt=1, description="Maximum share of failures")


class MetricGate(_Gate):
    """Expressions over what the nodes report; neither true is inconclusive, an unknown field is an error."""

    kind: Literal["metric"] = "metric"
    pass_if: str = Field(description="Expression; true: pass")
    fail_if: str = Field(default="False", description="Expression; true: fail")


class QueryGate(_Gate):
    """What a Prometheus server answers, asked again and again while the wave bakes; `alpha` has no part in it.

    No answer, an empty one, several series, NaN and infinity are never a pass: `UNANSWERED` of them are an error.
    """

    kind: Literal["query"] = "query"
    query: str = Field(
        max_length=10_000,
        description="PromQL with one value; $model, $version, $region, $rollout and $stage are filled in",
    )
    source: str = Field(default="main", description="Which server, by its name in the coordinator's `prometheus`")
    most: float | None = Field(default=None, allow_inf_nan=False, description="More than this fails")
    least: float | None = Field(default=None, allow_inf_nan=False, description="Less than this fails")
    times: int = Field(default=1, ge=1, le=1000, description="Answers in a row that decide, for good or bad")
    every_s: float = Field(default=30.0, ge=1, le=86_400, description="Seconds between two questions")

    @model_validator(mode="after")
    def _has_a_bound(self) -> QueryGate:
        if self.most is None and self.least is None:
            raise ValueError("needs `most` or `least`")
        return self

    @field_validator("query")
    @classmethod
    def _known_names(cls, value: str) -> str:
        unknown = {name for name in QueryTemplate(value).get_identifiers() if name not in QUERY_NAMES}
        if unknown:
            raise ValueError(f"${min(unknown)} is none of {', '.join(f'${name}' for name in QUERY_NAMES)}")
        return value


class QueryTemplate(Template):
    """PromQL with $names; $1 and such are label_replace's own."""

    idpattern = r"[a-z_]+"


QUERY_NAMES = ("model", "version", "region", "rollout", "stage")
UNANSWERED = 3
"""So many questions in a row without a value are an error."""

Gate = Annotated[
    PairedGate | DisagreementGate | LatencyGate | InferenceErrorGate | MetricGate | QueryGate,
    Field(discriminator="kind"),
]


class Measured(Strict):
    """What a node counted since it activated the release; a later report replaces an earlier one."""

    inferences: int = Field(default=0, ge=0)
    errors: int = Field(default=0, ge=0, description="Requests with good inputs that the release failed on")
    wins: int = Field(default=0, ge=0, description="Labelled samples that only the candidate gets right")
    losses: int = Field(default=0, ge=0, description="Those that only the incumbent gets right")
    ties: int = Field(default=0, ge=0)
    shadowed: int = Field(default=0, ge=0, description="Requests that the incumbent answered as well")
    disagreed: int = Field(default=0, ge=0)
    slower: int = Field(default=0, ge=0, description="Those on which the candidate took `SLOWER` times as long")
    latency_ms: float = Field(default=0.0, ge=0, description="Sum over the inferences")

    @model_validator(mode="after")
    def _parts_of_a_whole(self) -> Measured:
        if max(self.disagreed, self.slower) > self.shadowed:
            raise ValueError("`disagreed` and `slower` must not exceed `shadowed`")
        return self


SLOWER = 1.5
"""Times as long as the incumbent: `Measured.slower`."""

OnFailure = Literal["pause", "rollback_wave", "rollback_all"]


class WavePlan(Strict):
    """One region's share of a roll-out, canaries first. Waves of one `group` run in parallel."""

    region: str
    canaries: list[str]
    nodes: list[str] = Field(description="The rest of the cohort, after its canaries")
    group: int = Field(default=0, ge=0)
    approval: bool = Field(default=False, description="A person must let it begin")


class RolloutPlan(Strict):
    """Everything that is decided before the first node is offered anything."""

    model: str
    release: BlobRef
    version: int
    previous: dict[str, BlobRef] = Field(default={}, description="What each node goes back to; absent: nothing")
    fallback: BlobRef | None = Field(default=None, description="What nodes go back to that join later")
    selector: dict[str, str] = Field(default={}, description="Labels of nodes that join later")
    waves: list[WavePlan] = Field(min_length=1)
    slices: dict[str, list[str]] = Field(default={}, description="Nodes by `label=value`, for gates with slices")
    timezones: dict[str, str] = Field(default={}, description="Of nodes whose window is in their own time zone")
    max_error: float = Field(default=0.0, ge=0, le=1)
    min_success: float = Field(default=1.0, ge=0, le=1)
    min_attempted: int = Field(default=1, ge=1)
    claim_deadline_s: float = Field(default=300.0, gt=0)
    finish_deadline_s: float = Field(default=900.0, gt=0)
    cache_deadline_s: float = Field(default=3600.0, gt=0)
    bake: Bake = Bake()
    gates: list[Gate] = []
    on_inconclusive: Literal["wait", "pause"] = "wait"
    gate_deadline_s: float = Field(default=86_400.0, gt=0)
    approve_after_canary: bool = False
    rate: Rate = Rate()
    catch_up_in_flight: int = Field(default=10, ge=1)
    on_failure: OnFailure = "rollback_all"
    terms: Terms = Terms()
    region_bytes_per_s: int | None = Field(default=None, ge=1)
