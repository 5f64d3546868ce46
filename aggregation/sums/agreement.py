"""The parameters that are fixed before a sum, and the conversion of elements to kernel inputs. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fedtide.aggregation.sums.device import Values
from fedtide.aggregation.sums.fixed_point import FixedPoint
from fedtide.aggregation.sums.kernels import largest
from fedtide.fabric.errors import ConfigError
from fedtide.fabric.tensors.frame import Buffer, Tensor, TensorSpec, numbers

_USUAL_COUNT = 2.0**20


@dataclass(frozen=True, slots=True)
class Agreement:
    """The parameters shared by all processes that sum parts of one round, fixed before it.

    `points[i]` belongs to `specs[i]`; it is None where sums are taken in float64, in any order.
    """

    specs: tuple[TensorSpec, ...]
    points: tuple[FixedPoint | None, ...]
    max_terms: int

    @classmethod
    def of(cls, model: Sequence[Tensor], max_terms: int, *, exact: bool = True) -> Agreement:
        """For updates to `model`.

        Raises:
            ConfigError: the model holds NaN or infinity.
        """
        for tensor in model:
            if not np.isfinite(magnitude(tensor)):
                raise ConfigError(
                    f"tensor {tensor.name}",
                    "holds NaN or infinity: updates to it cannot be averaged",
                    "Keep buffers of constants (masks) out of the arrays; if it diverged, lower the learning rate",
                )
        points = [FixedPoint.agree(_expected(t), max_terms) if exact else None for t in model]
        return cls(tuple(t.spec for t in model), tuple(points), max_terms)


def _expected(tensor: Tensor) -> float:
    """The magnitude expected of its updates; integer counters start at 0 and grow large."""
    found = magnitude(tensor)
    return found if tensor.dtype in ("F16", "F32", "F64", "BF16") else max(found, _USUAL_COUNT)


def magnitude(tensor: Tensor) -> float:
    """The largest magnitude in a tensor; infinite if there is an infinity or NaN."""
    values = ready(tensor.dtype, tensor.data)
    return float(largest(values)) if values.size else 0.0


def ready(dtype: str, data: Buffer) -> Values:
    """Elements as inputs of kernels; float16, bfloat16 and small integers are widened, which is exact."""
    values = numbers(dtype, data)
    if values.dtype not in (np.float32, np.float64):
        values = values.astype(np.float32 if values.dtype == np.float16 else np.float64)
    return read_only(values if values.flags.aligned else values.copy())


def read_only(values: Values) -> Values:
    """The same elements, marked read-only: kernels are compiled for read-only arrays."""
    values.flags.writeable = False
    return values


def mean_dtype(dtype: str) -> str:
    """numpy's name of the dtype that a mean of tensors of `dtype` has."""
    return {"F16": "<f2", "F32": "<f4", "BF16": "<f4"}.get(dtype, "<f8")
