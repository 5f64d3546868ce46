"""Admission of updates: which updates are refused before they touch an average, and why.

Whatever the strategy, `poison` refuses what would spoil the model: NaN and infinity where it has none. Sums that are
fixed before updates arrive (`inspect`) need more: the names and shapes of the model. Precision is no ground for
refusal: flwr's strategies widen the global model (the moments of FedAdam, integer counters of batch norms) while nodes
go on answering in their own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from fedtide.fabric.tensors.frame import Tensor, TensorSpec

_BLOCK = 1 << 17


@dataclass(frozen=True, slots=True)
class Refusal:
    category: Literal["wrong_shape", "not_finite", "out_of_range", "bad_weight", "too_far", "malformed"]
    reason: str


def inspect(sent: Sequence[Tensor], returned: Sequence[Tensor]) -> Refusal | None:
    """Why `returned` may not be averaged with updates to `sent`, or None."""
    refusal = compare([t.spec for t in sent], [t.spec for t in returned])
    if refusal is not None:
        return refusal
    for tensor in returned:
        if not is_finite(tensor):
            return Refusal("not_finite", f"tensor {tensor.name!r} holds NaN or infinity")
    return None


def poison(sent: Mapping[str, Tensor], returned: Sequence[Tensor]) -> Refusal | None:
    """Why an update would spoil a model, or None: NaN or infinity at a place where the model that went out has none."""
    for tensor in returned:
        if is_finite(tensor):
            continue
        model = sent.get(tensor.name)
        held = model is not None and model.shape == tensor.shape and model.numpy().dtype.kind == "f"
        if model is None or not held or bool((np.isfinite(model.numpy()) & ~np.isfinite(tensor.numpy())).any()):
            return Refusal("not_finite", f"tensor {tensor.name!r} holds NaN or infinity")
    return None


def compare(sent: Sequence[TensorSpec], returned: Sequence[TensorSpec]) -> Refusal | None:
    """Why the names and shapes of `returned` do not match those of `sent`, or None."""
    expected = {t.name: t.shape for t in sent}
    got = {t.name: t.shape for t in returned}
    if expected.keys() != got.keys():
        odd = sorted(expected.keys() ^ got.keys())[0]
        where = "is missing" if odd in expected else "was not asked for"
        return Refusal("wrong_shape", f"tensor {odd!r} {where}")
    for name, shape in expected.items():
        if got[name] != shape:
            return Refusal("wrong_shape", f"tensor {name!r} has shape {got[name]}, expected {shape}")
    return None


def beyond(distance: float, limit: float) -> Refusal | None:
    """The refusal if an update moves the model by more than `limit`; else None."""
    if distance <= limit:
        return None
    return Refusal("too_far", f"moves the model by {distance:.4g}, allowed are {limit:.4g}")


def is_finite(tensor: Tensor) -> bool:
    """Whether every element is finite, without a temporary of the tensor's size."""
    array = tensor.numpy().reshape(-1)
    if array.dtype.kind != "f":
        return True
    return all(bool(np.isfinite(array[low : low + _BLOCK]).all()) for low in range(0, array.size, _BLOCK))
