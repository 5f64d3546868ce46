"""ONNX Runtime sessions of the releases that this node serves.

A session is immutable: a release that replaces another is another session.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime

from fedtide.edge_agent.config import AgentConfig
from fedtide.fabric.errors import ConfigError, FedtideError, RemoteError
from fedtide.fabric.plans.release import ReleaseManifest
from fedtide.fabric.tensors.blobs import BlobRef
from fedtide.fabric.tensors.frame import decode
from fedtide.fabric.tensors.preprocessing import apply

Arrays = dict[str, npt.NDArray[Any]]

_PREFERRED = ("CUDAExecutionProvider", "OpenVINOExecutionProvider", "CPUExecutionProvider")
_OPTIMIZATION = {
    "off": onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL,
    "basic": onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC,
    "extended": onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED,
    "all": onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL,
}


class ModelUnusable(FedtideError):
    """The ONNX file does not load, or its smoke inference is wrong."""


class InterfaceChanged(ModelUnusable):
    """The inputs or outputs differ from those of the release that is served."""


class InferenceFailed(RemoteError):
    """The model failed on a valid input."""


@dataclass(frozen=True, slots=True)
class GraphTensor:
    """An input or output of the graph; -1 stands for a dynamic size."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]

    def admits(self, shape: tuple[int, ...]) -> bool:
        return len(shape) == len(self.shape) and all(w in (-1, n) for w, n in zip(self.shape, shape, strict=True))


class Model:
    """One loaded release."""

    def __init__(self, release: BlobRef, manifest: ReleaseManifest, folder: Path, config: AgentConfig) -> None:
        self.release = release
        self.manifest = manifest
        try:
            self._session = onnxruntime.InferenceSession(
                str(folder / "model.onnx"), _options(config), providers=providers(config)
            )
        except ConfigError:
            raise
        except Exception as exc:  # onnxruntime raises its own untyped errors
            raise ModelUnusable(f"ONNX Runtime cannot load the graph: {exc}") from exc
        self.inputs = [_spec(i) for i in self._session.get_inputs()]
        self.outputs = [_spec(o) for o in self._session.get_outputs()]
        self._wanted = {spec.name: spec for spec in self.inputs}
        self._names = [spec.name for spec in self.outputs]
        self._steps = {p.input: p.steps for p in manifest.export.preprocessing}
        shapes = [value.shape for value in (*self._session.get_inputs(), *self._session.get_outputs())]
        first = {shape[0] if shape else None for shape in shapes}
        self.batchable = len(first) == 1 and isinstance(next(iter(first)), str)
        """Whether requests can be run as one: the first axis of every input and output is the same dynamic size."""
        self.seconds = 0.0
        """Moving average of the duration of a run, in seconds."""

    @property
    def name(self) -> str:
        return self.manifest.model

    @property
    def version(self) -> str:
        return str(self.manifest.version)

    def prepare(self, inputs: Arrays) -> Arrays:
        """Preprocess a request's inputs, and check them against the graph's.

        Raises:
            RemoteError: inputs that the graph does not take.
        """
        if self._wanted.keys() != inputs.keys():
            raise RemoteError(f"the model takes inputs {sorted(self._wanted)}, got {sorted(inputs)}")
        prepared: Arrays = {}
        for name, array in inputs.items():
            spec = self._wanted[name]
            steps = self._steps.get(name)
            ready = apply(steps, array) if steps else array
            if not spec.admits(ready.shape):
                raise RemoteError(f"input {name!r} has shape {list(ready.shape)}, the model takes {list(spec.shape)}")
            try:
                prepared[name] = np.ascontiguousarray(ready, dtype=spec.dtype)
            except (TypeError, ValueError) as exc:
                raise RemoteError(f"input {name!r} cannot be read as {spec.dtype}: {exc}") from exc
        return prepared

    def run(self, prepared: Arrays) -> Arrays:
        """Run the graph on inputs that `prepare` gave.

        Raises:
            InferenceFailed: ONNX Runtime raised an error.
        """
        began = time.perf_counter()
        try:
            results = self._session.run(None, prepared)
        except Exception as exc:  # onnxruntime raises its own untyped errors
            raise InferenceFailed(f"the model failed on its input: {exc}") from exc
        self.seconds += 0.1 * (time.perf_counter() - began - self.seconds)
        return {name: np.asarray(result) for name, result in zip(self._names, results, strict=True)}

    @property
    def interface(self) -> tuple[list[GraphTensor], list[GraphTensor]]:
        return self.inputs, self.outputs

    def check_interface(self, served: Model) -> None:
        """Raises InterfaceChanged unless clients of `served` can use this model unchanged."""
        for what, mine, theirs in (("input", self.inputs, served.inputs), ("output", self.outputs, served.outputs)):
            if mine != theirs:
                wanted = "; ".join(f"{s.name} {s.dtype} {list(s.shape)}" for s in mine)
                known = "; ".join(f"{s.name} {s.dtype} {list(s.shape)}" for s in theirs)
                raise InterfaceChanged(
                    f"its {what}s are {wanted}; those of version {served.version}, which is served, are {known}",
                    "If clients are ready for it: fedtide rollout start --set new_interface=true",
                )

    def smoke_test(self, folder: Path) -> None:
        """Run the release's own sample: the outputs must be those of its manifest.

        Raises:
            ModelUnusable: other outputs, other names, NaN.
        """
        sample = {t.name: t.numpy() for t in decode((folder / "smoke.safetensors").read_bytes())}
        inputs = {k.removeprefix("in."): v for k, v in sample.items() if k.startswith("in.")}
        try:
            if inputs.keys() != self._wanted.keys():
                raise RemoteError(f"the graph takes inputs {sorted(self._wanted)}, the sample has {sorted(inputs)}")
            found = self.run({n: np.ascontiguousarray(a, self._wanted[n].dtype) for n, a in inputs.items()})
        except RemoteError as exc:
            raise ModelUnusable(f"smoke inference failed: {exc}") from exc
        for name, expected in sample.items():
            if name.startswith("out."):
                try:
                    self._compare(name.removeprefix("out."), expected, found)
                except (TypeError, ValueError) as exc:
                    raise ModelUnusable(f"smoke inference: {name} cannot be compared: {exc}") from exc

    def _compare(self, name: str, expected: npt.NDArray[Any], found: Arrays) -> None:
        got = found.get(name)
        if got is None or got.shape != expected.shape:
            raise ModelUnusable(f"smoke inference: output {name!r} is missing or has another shape")
        difference = float(np.max(np.abs(got.astype(np.float64) - expected.astype(np.float64)), initial=0.0))
        if not difference <= self.manifest.smoke_tolerance:
            raise ModelUnusable(
                f"smoke inference: output {name!r} differs by {difference:.3g}, "
                f"allowed are {self.manifest.smoke_tolerance:.3g}"
            )


def providers(config: AgentConfig) -> list[str]:
    """The execution providers of a session, in order.

    Raises:
        ConfigError: one that is configured is not in this build of ONNX Runtime.
    """
    installed = onnxruntime.get_available_providers()
    if not config.providers:
        return [name for name in _PREFERRED if name in installed]
    for name in config.providers:
        if name not in installed:
            raise ConfigError(
                "providers", f"{name!r} is not installed", f"This ONNX Runtime has {', '.join(installed)}"
            )
    return config.providers


def _options(config: AgentConfig) -> onnxruntime.SessionOptions:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = config.inference_threads
    options.inter_op_num_threads = 1
    options.graph_optimization_level = _OPTIMIZATION[config.graph_optimization]
    options.log_severity_level = 3
    for key, value in config.session_options.items():
        options.add_session_config_entry(key, value)
    return options


def _spec(value: Any) -> GraphTensor:
    kind = str(value.type).removeprefix("tensor(").removesuffix(")")
    dtype = {"float": "float32", "double": "float64", "string": "object"}.get(kind, kind)
    try:
        return GraphTensor(value.name, np.dtype(dtype), tuple(d if isinstance(d, int) else -1 for d in value.shape))
    except TypeError as exc:
        raise ModelUnusable(f"{value.name!r} has type {value.type}, which is not served") from exc
