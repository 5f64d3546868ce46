"""A release's preprocessing: the steps as data, and their application to one request input. Pure numpy."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field

from fedtide.fabric.errors import RemoteError
from fedtide.fabric.strict import Strict, Tagged


class _Step(Tagged):
    TAG = "op"


class Scale(_Step):
    """x * factor + offset."""

    op: Literal["scale"] = "scale"
    factor: float = 1.0
    offset: float = 0.0


class Normalize(_Step):
    """(x - mean) / std, broadcast against the last axes."""

    op: Literal["normalize"] = "normalize"
    mean: list[float]
    std: list[float]


class Reshape(_Step):
    """To `shape`; at most one -1."""

    op: Literal["reshape"] = "reshape"
    shape: list[int]


Step = Annotated[Scale | Normalize | Reshape, Field(discriminator="op")]


class Preprocessing(Strict):
    """What is done to one request input before it becomes the graph's input of the same name."""

    input: str
    steps: list[Step] = []


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
