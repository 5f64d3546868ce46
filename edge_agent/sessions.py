"""ONNX Runtime sessions of the releases that this node serves.

A session is immutable; what is served is one dictionary entry, so a swap is one assignment:
requests that hold the old session finish on it, later ones get the new one.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime

from edge_agent.preprocess import apply
from fabric.blobs import BlobRef
from fabric.errors import FedtideError, RemoteError
from fabric.release import ReleaseManifest
from fabric.tensors import decode

_PROVIDERS = ["CPUExecutionProvider"]


class ModelUnusable(FedtideError):
    """The ONNX file does not load, or its smoke inference is wrong."""


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """An input or output of the graph; -1 stands for a dynamic size."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]


class Model:
    """One loaded release."""

    def __init__(self, release: BlobRef, manifest: ReleaseManifest, folder: Path, threads: int) -> None:
        self.release = release
        self.manifest = manifest
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        try:
            self._session = onnxruntime.InferenceSession(str(folder / "model.onnx"), options, providers=_PROVIDERS)
        except Exception as exc:  # onnxruntime raises its own untyped errors
            raise ModelUnusable(f"ONNX Runtime cannot load the graph: {exc}") from exc
        self.inputs = [_spec(i) for i in self._session.get_inputs()]
        self.outputs = [_spec(o) for o in self._session.get_outputs()]
        self._steps = {p.input: p.steps for p in manifest.export.preprocessing}

    def infer(self, inputs: dict[str, npt.NDArray[Any]]) -> dict[str, npt.NDArray[Any]]:
        """Preprocess and run.

        Raises:
            RemoteError: inputs that the graph does not take.
        """
        prepared = {name: apply(self._steps.get(name, []), array) for name, array in inputs.items()}
        return self.run(prepared)

    def run(self, inputs: dict[str, npt.NDArray[Any]]) -> dict[str, npt.NDArray[Any]]:
        """Run the graph on inputs as they are."""
        wanted = {spec.name: spec for spec in self.inputs}
        if wanted.keys() != inputs.keys():
            raise RemoteError(f"the model takes inputs {sorted(wanted)}, got {sorted(inputs)}")
        cast = {name: np.ascontiguousarray(array, dtype=wanted[name].dtype) for name, array in inputs.items()}
        try:
            results = self._session.run(None, cast)
        except Exception as exc:  # onnxruntime raises its own untyped errors
            raise RemoteError(f"the model refused its input: {exc}") from exc
        return {spec.name: np.asarray(result) for spec, result in zip(self.outputs, results, strict=True)}

    def smoke_test(self, folder: Path) -> None:
        """The release's own sample must give the outputs that its manifest promises.

        Raises:
            ModelUnusable: other outputs, other names, NaN.
        """
        sample = {t.name: t.numpy() for t in decode((folder / "smoke.safetensors").read_bytes())}
        inputs = {k.removeprefix("in."): v for k, v in sample.items() if k.startswith("in.")}
        try:
            found = self.run(inputs)
        except RemoteError as exc:
            raise ModelUnusable(f"smoke inference failed: {exc}") from exc
        for name, expected in sample.items():
            if name.startswith("out."):
                self._compare(name.removeprefix("out."), expected, found)

    def _compare(self, name: str, expected: npt.NDArray[Any], found: dict[str, npt.NDArray[Any]]) -> None:
        got = found.get(name)
        if got is None or got.shape != expected.shape:
            raise ModelUnusable(f"smoke inference: output {name!r} is missing or has another shape")
        difference = float(np.max(np.abs(got.astype(np.float64) - expected.astype(np.float64)), initial=0.0))
        if not difference <= self.manifest.smoke_tolerance:
            raise ModelUnusable(
                f"smoke inference: output {name!r} differs by {difference:.3g}, "
                f"allowed are {self.manifest.smoke_tolerance:.3g}"
            )


def _spec(value: Any) -> TensorSpec:
    kind = str(value.type).removeprefix("tensor(").removesuffix(")")
    dtype = {"float": "float32", "double": "float64", "bool": "bool", "float16": "float16"}.get(kind, kind)
    try:
        return TensorSpec(value.name, np.dtype(dtype), tuple(d if isinstance(d, int) else -1 for d in value.shape))
    except TypeError as exc:
        raise ModelUnusable(f"{value.name!r} has type {value.type}, which is not served") from exc
