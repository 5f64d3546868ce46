"""The data of a run: as it is requested, and as it is decided. Pure data.

One set of options, two forms. A `RunRequest` may leave out what the model's latest release decides; `resolved` makes
the `RunSpec` that the log keeps.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from fedtide.fabric.ids import NAME
from fedtide.fabric.plans.round_policy import RoundPolicy, Selection, StopRule
from fedtide.fabric.plans.tracking import Tracking
from fedtide.fabric.strict import ConfigValues, Strict
from fedtide.fabric.tensors.blobs import BlobRef

LabelName = Annotated[str, Field(pattern=NAME)]
KeyId = Annotated[str, Field(pattern=r"^[0-9a-f]{1,64}$")]
WheelName = Annotated[str, Field(max_length=200, pattern=r"^[A-Za-z0-9_.+!-]+\.whl$")]


class AppRef(Strict):
    """A Flower app bundle (fabric.flower.apps)."""

    name: str
    bundle: BlobRef
    requirements: list[Annotated[str, Field(max_length=1000)]] = Field(
        default=[], max_length=200, description="Packages it needs that not every node has with flwr (PEP 508)"
    )
    wheels: dict[WheelName, BlobRef] = Field(
        default={}, max_length=200, description="Wheels that travel with it, by name"
    )
    signatures: dict[KeyId, Annotated[str, Field(max_length=2000)]] = Field(
        default={}, max_length=16, description="Of its publisher (fabric.trust.claims), by key"
    )


class RunOptions(Strict):
    """What a request and a decided run have in common."""

    model: str | None = Field(default=None, description="Registry name of the result, or None: no release is made")
    rounds: int | None = Field(default=None, ge=1, description="None: as the app says")
    run_config: ConfigValues = Field(default={}, description="Values over those of the app's pyproject.toml")
    selector: dict[str, str] = Field(default={}, description="Labels a node must have; `region` counts as one")
    purpose: Literal["train", "evaluate"] = Field(default="train", description="evaluate: only asks how good `base` is")
    selection: Selection = Field(default=Selection(), description="Which nodes take part in a round")
    policy: RoundPolicy = Field(default=RoundPolicy(), description="When a round closes")
    stop: StopRule | None = Field(default=None, description="When the run ends before its last round")
    track: Tracking | None = Field(default=None, description="Where it is reported: MLflow, TensorBoard")
    labels: dict[LabelName, Annotated[str, Field(max_length=100)]] = Field(
        default={}, max_length=20, description="What its costs are told apart by: customer, cost centre, experiment"
    )


class RunSpec(RunOptions):
    """A run as it was decided: an app at a digest, where it runs, and for how long."""

    app: AppRef
    base: BlobRef | None = Field(default=None, description="The release manifest to start from")
    start: BlobRef | None = Field(default=None, description="Instead of `base`: the arrays to start from")


class RunRequest(RunOptions):
    """A run as it is asked for, by a person or by a trigger rule."""

    app: AppRef | None = Field(default=None, description="None: the app of the model's latest release")
    base: str | None = Field(
        default=None,
        description="Start from a release of the model (`latest`; `served`: what most nodes serve, else the latest; "
        "or a version), or from a run: RUN[/ROUND]. With `app`, the first run of a model has nothing to start from",
    )

    def resolved(
        self, app: AppRef, base: BlobRef | None, run_config: ConfigValues, start: BlobRef | None = None
    ) -> RunSpec:
        """The run that follows, with what the registry decides."""
        options = {name: getattr(self, name) for name in RunOptions.model_fields}
        return RunSpec(**{**options, "app": app, "base": base, "run_config": run_config, "start": start})
