"""A release's preprocessing, applied to one request input. Pure numpy."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from fedtide.fabric.errors import RemoteError
from fedtide.fabric.plans.release import Normalize, Reshape, Scale, Step


def apply(steps: list[Step], array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """The steps in order.

    Raises:
        RemoteError: the array does not fit a step.
    """
    for step in steps:
        try:
            array = _one(step, array)
        except (TypeError, ValueError) as exc:
            raise RemoteError(
                f"preprocessing {step.op}: {exc}", "Send the shape that the model's metadata names"
            ) from exc
    return array


def _one(step: Step, array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    match step:
        case Scale(factor=factor, offset=offset):
            return array * np.float32(factor) + np.float32(offset)
        case Normalize(mean=mean, std=std):
            return (array - np.asarray(mean, np.float32)) / np.asarray(std, np.float32)
        case Reshape(shape=shape):
            return array.reshape(shape)
