"""Admission of updates: which updates are refused before they touch a sum, and why.

An update must have the names and shapes of the model it was trained from, and only finite
numbers. Precision is no ground for refusal: flwr's strategies widen the global model (the moments
of FedAdam, integer counters of batch norms) while nodes go on answering in their own.
Applied where flwr's own code averages arrays; others may answer with anything.
"""

from __future__ import annotations

from collections.abc import Sequence
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
