"""A training bundle: one training step, evaluation and inference as ONNX graphs, and what a node must know of them.

One zip file, without compression: `bundle.json` (a BundleManifest), three graphs, and a tensor frame of initial values.
The names of a graph's inputs say what they are: `param.W`, `frozen.W`, `buffer.W`, `slot.momentum.W`, `anchor.W`,
`correction.W`, `noise.0`, `input.image`, `target`, `rate`, `step`, `mu`; outputs that replace an input are `new.` and
its name.
"""

from __future__ import annotations

import hashlib
import io
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from pydantic import Field, ValidationError

from fedtide.fabric.errors import MalformedMessage
from fedtide.fabric.strict import ConfigValues, Strict
from fedtide.fabric.tensors.frame import Tensor, TensorSpec, decode, encode
from fedtide.fabric.tensors.preprocessing import Preprocessing

TRAINING = "training.bundle"
"""The file of a training bundle inside an app."""
TRAIN, EVALUATE, INFER, INITIAL = "train.onnx", "evaluate.onnx", "infer.onnx", "initial.frame"
IGNORED = -100
"""Samples with this label do not count in a loss: torch's `ignore_index`."""
_MANIFEST = "bundle.json"
_EPOCH = (1980, 1, 1, 0, 0, 0)


class WrongDigest(MalformedMessage):
    """A part of a training bundle is not what its manifest says."""


class BundleTensor(Strict):
    """A tensor of a graph. `per_sample`: size of the first axis per sample of the batch; 0: the axis is fixed."""

    name: str
    dtype: str = Field(description="safetensors' name")
    shape: tuple[int, ...] = Field(description="For a batch of one")
    per_sample: int = 0

    def shape_for(self, batch: int) -> tuple[int, ...]:
        return (self.per_sample * batch, *self.shape[1:]) if self.per_sample else self.shape


class Settings(Strict):
    """Keys of the run config under which a task finds what is not in the graph."""

    learning_rate: str = "learning-rate"
    epochs: str = "local-epochs"
    batch_size: str = "batch-size"
    seed: str = "seed"


class BundleManifest(Strict):
    """What a node must know before it loads a graph."""

    version: Literal[1] = 1
    digests: dict[str, str] = Field(description="sha256 of each part")
    parameters: list[BundleTensor] = Field(description="Trained")
    frozen: list[BundleTensor] = []
    buffers: list[BundleTensor] = []
    slots: list[str] = Field(default=[], description="Optimiser state: each has one tensor per parameter, from 0")
    inputs: list[BundleTensor]
    target: BundleTensor
    noise: list[BundleTensor] = []
    outputs: list[str] = Field(description="Of the inference graph")
    metrics: list[str] = []
    classes: int | None = Field(default=None, description="Labels are below it, or IGNORED; None: no classes")
    smallest_batch: int = Field(default=1, description="torch takes no step with fewer samples (batch norm)")
    train_loss: str = Field(default="train_loss", description="The metric's name in answers")
    evaluation_loss: str = "loss"
    report_steps: bool = False
    proximal: bool = False
    controls: bool = False
    settings: Settings = Settings()
    fixed: ConfigValues = Field(default={}, description="Run config values that are fixed in the graphs")
    data: str = Field(default="", description="module:function of the node's data source; empty: captured samples")
    preprocessing: list[Preprocessing] = Field(default=[], description="Of the source's columns")
    torch_difference: float = Field(description="Largest relative difference to torch when it was made")


@dataclass(frozen=True, slots=True)
class TrainingBundle:
    manifest: BundleManifest
    parts: Mapping[str, bytes]

    def initial(self) -> dict[str, Tensor]:
        """Values of frozen parameters and buffers, for what a message does not carry."""
        return {t.name: t for t in decode(self.parts[INITIAL])}


def pack(manifest: BundleManifest, parts: Mapping[str, bytes]) -> bytes:
    """The bundle's file; equal input, equal bytes. The manifest's digests are made here."""
    digests = {name: hashlib.sha256(data).hexdigest() for name, data in parts.items()}
    named = {_MANIFEST: manifest.model_copy(update={"digests": digests}).model_dump_json().encode(), **parts}
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in named.items():
            archive.writestr(zipfile.ZipInfo(name, _EPOCH), data)
    return buffer.getvalue()


def read(data: bytes) -> TrainingBundle:
    """Read and check a bundle.

    Raises:
        WrongDigest: a part has other bytes than when it was made.
        MalformedMessage: it is no training bundle, or one of another version.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            manifest = BundleManifest.model_validate_json(archive.read(_MANIFEST))
            parts = {name: archive.read(name) for name in (TRAIN, EVALUATE, INFER, INITIAL)}
    except ValidationError as exc:
        raise MalformedMessage(f"{_MANIFEST} does not fit this fedtide: {exc.errors()[0]['msg']}", _AGAIN) from exc
    except (zipfile.BadZipFile, KeyError, NotImplementedError) as exc:
        # zipfile checks a sum of its own, which a damaged file fails first.
        kind = WrongDigest if "CRC" in str(exc) else MalformedMessage
        raise kind(f"{TRAINING} is damaged or no training bundle: {exc}", _AGAIN) from exc
    for name, part in parts.items():
        found, wanted = hashlib.sha256(part).hexdigest(), manifest.digests.get(name)
        if found != wanted:
            raise WrongDigest(f"{name} in {TRAINING} has the digest {found[:12]}, its manifest says {wanted}", _AGAIN)
    return TrainingBundle(manifest, parts)


def frame(tensors: list[Tensor]) -> bytes:
    return b"".join(encode(tensors))


def spec_of(name: str, tensor: TensorSpec) -> BundleTensor:
    return BundleTensor(name=name, dtype=tensor.dtype, shape=tensor.shape)


_AGAIN = "Export the app's training again: fedtide app export-training"
