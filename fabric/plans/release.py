"""The release manifest: one immutable model version and where it came from."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from fedtide.fabric.encoding import from_json
from fedtide.fabric.ids import NAME
from fedtide.fabric.plans.run_spec import AppRef
from fedtide.fabric.strict import ConfigValues, Strict
from fedtide.fabric.tensors.blobs import BlobRef
from fedtide.fabric.tensors.preprocessing import Preprocessing


class Scoring(Strict):
    """How an answer is compared with the label that a sample got, and with the answer of another release.

    `argmax`: the index of the largest of the last axis; `threshold`: 1 at or above `at`; `value`: the number itself,
    equal within `at`. `auto`: argmax where the last axis is longer than one, else value.
    """

    output: str = Field(default="", description="Empty: the graph's first output")
    rule: Literal["auto", "argmax", "threshold", "value"] = "auto"
    at: float = 0.5


class Export(Strict):
    """What an app's export hook returns beside the ONNX file it wrote (docs/apps.md)."""

    preprocessing: list[Preprocessing] = []
    labels: list[str] = []
    scoring: Scoring = Scoring()


class PrivacySpent(Strict):
    """Rounds of one run that added Gaussian noise of `noise_multiplier` to a sum of clipped updates."""

    run: str
    rounds: int = Field(ge=1)
    noise_multiplier: float = Field(gt=0, description="Standard deviation over the norm of one clipped update")
    cohort: int = Field(ge=1, description="Updates in each sum")
    population: int | None = Field(default=None, description="Nodes the cohorts were drawn from; None: no sampling")


class Privacy(Strict):
    """The privacy ledger of a model: what the training of it and its ancestors has revealed about any one node."""

    entries: list[PrivacySpent]
    epsilon: float = Field(ge=0)
    delta: float = Field(gt=0, lt=1)
    unit: Literal["node"] = "node"


class Lineage(Strict):
    """Where a release came from."""

    app: AppRef
    run_config: ConfigValues = Field(default={}, description="Overrides of the app's own config")
    run: str
    rounds: int = Field(ge=0)
    participants: int = Field(ge=0, description="Distinct nodes with at least one accepted update; no names")
    updates: int = Field(ge=0, description="Accepted updates over all rounds")
    base: BlobRef | None = Field(default=None, description="Manifest of the release the run started from")
    privacy: Privacy | None = Field(default=None, description="None: no guarantee")


def decode_release(raw: bytes) -> ReleaseManifest:
    """Raises MalformedMessage unless `raw` is a manifest."""
    return from_json(ReleaseManifest, raw, "release manifest")


class ReleaseManifest(Strict):
    """One release. Its name in the broker is the digest of this manifest's bytes."""

    model: str = Field(pattern=NAME)
    version: int = Field(ge=1)
    onnx: BlobRef
    parts: list[BlobRef] = Field(default=[], description="The ONNX file cut at its large tensors; empty: one blob")
    arrays: BlobRef = Field(description="The global parameters as a tensor frame, to start the next run from")
    smoke: BlobRef = Field(description="Frame of `in.<input>` and `out.<output>` tensors the graph must reproduce")
    smoke_tolerance: float = Field(default=1e-3, gt=0)
    export: Export = Export()
    metrics: dict[str, float] = {}
    lineage: Lineage
    onnxruntime: str = Field(default=">=1.20", description="Runtime range the graph was checked with")

    @property
    def onnx_parts(self) -> list[BlobRef]:
        """The blobs whose bytes, one after the other, are the ONNX file."""
        return self.parts or [self.onnx]

    @property
    def served(self) -> list[BlobRef]:
        """The blobs that a node needs beside the manifest itself, each once."""
        return list(dict.fromkeys([*self.onnx_parts, self.smoke]))
