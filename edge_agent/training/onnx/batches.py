"""Batches from a node's data source, checked against a bundle's manifest."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fedtide.edge_agent.samples.source import LABEL, SAMPLES, CapturedSamples, DataSource
from fedtide.edge_agent.training.onnx.errors import WrongData
from fedtide.fabric.flower.app_objects import load_object
from fedtide.fabric.strict import ConfigValues
from fedtide.fabric.tensors.frame import numpy_dtype
from fedtide.fabric.tensors.preprocessing import apply
from fedtide.fabric.tensors.training_bundle import IGNORED, BundleManifest, BundleTensor

Array = npt.NDArray[Any]
_KINDS = {"f": "a float", "i": "an integer", "u": "an integer", "b": "a boolean"}


class Batches:
    """A data source as batches of a bundle's graph."""

    def __init__(self, source: DataSource, manifest: BundleManifest) -> None:
        """Raises WrongData: it is empty, or gives other columns, types or shapes."""
        self._source = source
        self._manifest = manifest
        self._steps = {p.input: p.steps for p in manifest.preprocessing}
        self.samples = len(source)
        if not self.samples:
            raise WrongData("the node's data source is empty", "Give the node data, or keep it out of the run")
        self.take([0])

    def take(self, indices: Sequence[int]) -> dict[str, Array] | None:
        """Samples by the names of the graph's inputs; None if all of them were deleted meanwhile.

        Raises:
            WrongData: they do not fit the graph.
        """
        columns = self._source.read(indices)
        if not columns:
            return None
        found = {f"input.{spec.name}": self._column(columns, spec, spec.name) for spec in self._manifest.inputs}
        found["target"] = self._column(columns, self._manifest.target, LABEL)
        if len({len(array) for array in found.values()}) != 1:
            raise WrongData("the node's data source gives columns of different lengths", _REMEDY)
        self._check_labels(found["target"])
        return found

    def _check_labels(self, labels: Array) -> None:
        # ONNX Runtime would take -1 for the last class.
        classes = self._manifest.classes
        if classes is None:
            return
        wrong = labels[((labels < 0) | (labels >= classes)) & (labels != IGNORED)]
        if len(wrong):
            raise WrongData(
                f"the node's data source gives the label {wrong[0]} to a model of {classes} classes", _REMEDY
            )

    def _column(self, columns: Mapping[str, Array], spec: BundleTensor, name: str) -> Array:
        if name not in columns:
            raise WrongData(f"the node's data source gives no column {name!r}, only {sorted(columns)}", _REMEDY)
        array = np.asarray(apply(self._steps[name], columns[name]) if name in self._steps else columns[name])
        wanted = numpy_dtype(spec.dtype)
        if array.shape[1:] != spec.shape[1:] or array.ndim == 0:
            raise WrongData(
                f"column {name!r} of the node's data source has samples of shape {array.shape[1:]}, "
                f"the bundle was made for {spec.shape[1:]}",
                _REMEDY,
            )
        if array.dtype.kind not in _KINDS or not np.can_cast(array.dtype, wanted, "same_kind"):
            raise WrongData(
                f"column {name!r} of the node's data source has the type {array.dtype}, the bundle takes {wanted}",
                _REMEDY,
            )
        return np.ascontiguousarray(array, wanted)


_REMEDY = "Change the data source that the app's training plan names (docs/training-without-torch.md)"


def open_source(app_dir: Path, reference: str, model: str | None, node: ConfigValues, run: ConfigValues) -> DataSource:
    """The source that the app names, or the samples that the node captured for its model.

    Raises:
        WrongData: there is none, or opening it failed.
        AppLoadError: the app's module cannot be imported.
    """
    if not reference:
        file = node.get(SAMPLES)
        if not isinstance(file, str) or model is None:
            raise WrongData("the app names no data source, and the node captured no samples for its model", _REMEDY)
        return CapturedSamples.open(file, model)
    hook = load_object(reference, app_dir)
    try:
        source: DataSource = hook(dict(node), dict(run))
    except Exception as exc:  # an app's hook may raise anything
        raise WrongData(f"the data source {reference} raised {type(exc).__name__}: {exc}", _REMEDY) from exc
    return source


def slices(order: npt.NDArray[np.int64], size: int, smallest: int = 1) -> Iterator[list[int]]:
    """Slices of length `size`; a remainder shorter than `smallest` is left out."""
    for begin in range(0, len(order), size):
        part = order[begin : begin + size].tolist()
        if len(part) >= smallest:
            yield part
