"""A bundle's graphs in ONNX Runtime. Tensors that a step replaces stay in the runtime's memory between steps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime

from fedtide.edge_agent.training.onnx.errors import GraphMismatch
from fedtide.fabric.tensors.frame import numpy_dtype
from fedtide.fabric.tensors.training_bundle import EVALUATE, TRAIN, BundleManifest, BundleTensor, TrainingBundle

Array = npt.NDArray[Any]
Arrays = dict[str, Array]

_TYPES = {"F32": "tensor(float)", "F64": "tensor(double)", "I64": "tensor(int64)", "I32": "tensor(int32)"} | {
    "U8": "tensor(uint8)",
    "BOOL": "tensor(bool)",
    "F16": "tensor(float16)",
}
_AGAIN = "Export the app's training again: fedtide app export-training"


class TrainingGraph:
    """Runs training steps. Two sets of tensors alternate: a step reads one and writes the other, without a copy."""

    def __init__(self, bundle: TrainingBundle, values: Mapping[str, Array], threads: int) -> None:
        """
        Args:
            values: what the graph needs beside the batch, by the names of its inputs; missing ones start as zeros.

        Raises:
            GraphMismatch: the graph takes something else than its manifest says.
        """
        manifest = bundle.manifest
        self._session = _session(bundle, TRAIN, threads)
        expected = train_specs(manifest)
        _check(self._session, TRAIN, expected)
        self._replaced = list(replaced_specs(manifest))
        if wrong := {o.name for o in self._session.get_outputs()} ^ {"loss", *(f"new.{n}" for n in self._replaced)}:
            raise GraphMismatch(f"{TRAIN} and its manifest differ in the output {min(wrong)!r}", _AGAIN)
        self._batch = [name for name in expected if name.startswith(("input.", "noise.")) or name == "target"]
        own = [name for name in expected if name not in self._batch]
        first = {name: _own(expected[name], values.get(name)) for name in own}
        spare = {name: np.empty_like(first[name]) for name in self._replaced}
        self._sets = (first, {**first, **spare})
        self._loss = np.zeros((), np.float32)
        self._bindings = [self._bound(self._sets[i], self._sets[1 - i]) for i in (0, 1)]
        self._turn = 0
        self.steps = 0

    def step(self, batch: Mapping[str, Array]) -> float:
        """One step on `batch` (inputs, target and noise); returns its loss."""
        self.steps += 1
        self._sets[0]["step"][...] = self.steps
        binding = self._bindings[self._turn]
        for name in self._batch:
            binding.bind_cpu_input(name, batch[name])
        self._session.run_with_iobinding(binding)
        self._turn = 1 - self._turn
        return float(self._loss)

    def values(self) -> Arrays:
        """Views of the current values of the tensors that steps replace."""
        return {name: self._sets[self._turn][name] for name in self._replaced}

    def _bound(self, read: Arrays, written: Arrays) -> Any:
        binding = self._session.io_binding()
        for name, array in read.items():
            binding.bind_ortvalue_input(name, onnxruntime.OrtValue.ortvalue_from_numpy(array))
        for name in self._replaced:
            binding.bind_ortvalue_output(f"new.{name}", onnxruntime.OrtValue.ortvalue_from_numpy(written[name]))
        binding.bind_ortvalue_output("loss", onnxruntime.OrtValue.ortvalue_from_numpy(self._loss))
        return binding


class EvaluationGraph:
    """Measures a batch."""

    def __init__(self, bundle: TrainingBundle, values: Mapping[str, Array], threads: int) -> None:
        """Raises GraphMismatch, as TrainingGraph does."""
        self._session = _session(bundle, EVALUATE, threads)
        expected = evaluate_specs(bundle.manifest)
        _check(self._session, EVALUATE, expected)
        self._names = [o.name for o in self._session.get_outputs()]
        self._values = {i.name: values[i.name] for i in self._session.get_inputs() if i.name in values}

    def measure(self, batch: Mapping[str, Array]) -> dict[str, float]:
        """The loss and the metrics, each the mean over the batch."""
        found = self._session.run(self._names, {**self._values, **batch})
        return {name: float(value) for name, value in zip(self._names, found, strict=True)}


def train_specs(manifest: BundleManifest) -> dict[str, BundleTensor]:
    """All inputs of the training graph."""
    scalar = {
        name: BundleTensor(name=name, dtype=dtype, shape=()) for name, dtype in (("rate", "F32"), ("step", "I64"))
    }
    each: dict[str, BundleTensor] = {}
    for parameter in manifest.parameters:
        kinds = [f"slot.{slot}" for slot in manifest.slots]
        kinds += ["anchor"] * manifest.proximal + ["correction"] * manifest.controls
        each |= {f"{kind}.{parameter.name}": parameter for kind in kinds}
    if manifest.proximal:
        scalar["mu"] = BundleTensor(name="mu", dtype="F32", shape=())
    noise = {f"noise.{i}": spec for i, spec in enumerate(manifest.noise)}
    return {**evaluate_specs(manifest), **each, **noise, **scalar}


def replaced_specs(manifest: BundleManifest) -> dict[str, BundleTensor]:
    """The inputs that a step replaces."""
    kinds = ("param.", "slot.", "buffer.")
    return {name: spec for name, spec in train_specs(manifest).items() if name.startswith(kinds)}


def evaluate_specs(manifest: BundleManifest) -> dict[str, BundleTensor]:
    """All inputs of the evaluation graph."""
    groups = (("param", manifest.parameters), ("frozen", manifest.frozen), ("buffer", manifest.buffers))
    model = {f"{kind}.{spec.name}": spec for kind, specs in groups for spec in specs}
    return {**model, **{f"input.{spec.name}": spec for spec in manifest.inputs}, "target": manifest.target}


def _session(bundle: TrainingBundle, graph: str, threads: int) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    # Waiting threads would keep a core busy that inference needs.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 3
    try:
        return onnxruntime.InferenceSession(bundle.parts[graph], options, providers=["CPUExecutionProvider"])
    except Exception as exc:  # onnxruntime raises its own untyped errors
        raise GraphMismatch(f"ONNX Runtime cannot load {graph}: {exc}", _AGAIN) from exc


def _check(session: onnxruntime.InferenceSession, graph: str, expected: Mapping[str, BundleTensor]) -> None:
    for found in session.get_inputs():
        spec = expected.get(found.name)
        if spec is None:
            raise GraphMismatch(f"{graph} takes {found.name!r}, of which its manifest knows nothing", _AGAIN)
        fixed = found.shape[1:] if spec.per_sample else found.shape
        wanted = list(spec.shape[1:] if spec.per_sample else spec.shape)
        if found.type != _TYPES.get(spec.dtype) or list(fixed) != wanted:
            raise GraphMismatch(
                f"{graph} takes {found.name!r} as {found.type} {found.shape}, its manifest says {spec.dtype} {wanted}",
                _AGAIN,
            )
    if missing := expected.keys() - {i.name for i in session.get_inputs()}:
        raise GraphMismatch(f"{graph} does not take {min(missing)!r}, which its manifest names", _AGAIN)


def _own(spec: BundleTensor, value: Array | None) -> Array:
    """A private copy, since steps write into it."""
    if value is None:
        return np.zeros(spec.shape, numpy_dtype(spec.dtype))
    return np.array(value, numpy_dtype(spec.dtype), order="C").reshape(spec.shape)
