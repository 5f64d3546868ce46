"""Compares a model's predictions with labels, and two models' predictions. Pure numpy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from fedtide.fabric.errors import RemoteError
from fedtide.fabric.plans.release import Export, Scoring

Array = npt.NDArray[Any]
Label = int | float | str
Labels = Label | Sequence[Label]


def predictions(scoring: Scoring, outputs: dict[str, Array]) -> Array:
    """One number a row: a class, or a value.

    Raises:
        RemoteError: there is no such output, or it has no numbers.
    """
    name = scoring.output or next(iter(outputs), "")
    array = outputs.get(name)
    if array is None or array.dtype.kind not in "biuf":
        raise RemoteError(f"scoring: {name!r} is no output with numbers", f"There are {', '.join(outputs)}")
    rows = array.reshape(array.shape[0], math.prod(array.shape[1:])) if array.ndim else array.reshape(1, 1)
    if not rows.shape[1]:
        raise RemoteError(f"scoring: output {name!r} is empty")
    rule = scoring.rule
    if rule == "auto":
        rule = "argmax" if rows.shape[1] > 1 else "value"
    if rule == "argmax":
        return np.asarray(rows.argmax(axis=1))
    first = rows[:, 0].astype(np.float64)
    return (first >= scoring.at).astype(np.float64) if rule == "threshold" else first


def same(scoring: Scoring, one: Array, other: Array) -> npt.NDArray[np.bool_]:
    """Row by row, whether two predictions, or a prediction and a label, agree.

    Raises:
        RemoteError: they have different numbers of rows.
    """
    if one.shape != other.shape:
        raise RemoteError(f"{one.shape[0]} rows cannot be compared with {other.shape[0]}")
    if scoring.rule == "value" or (scoring.rule == "auto" and one.dtype.kind == "f"):
        with np.errstate(invalid="ignore"):  # two infinities: they are equal, and have no difference
            return np.asarray((one == other) | (np.abs(one.astype(np.float64) - other) <= scoring.at))
    return np.asarray(one == other)


def targets(export: Export, label: Labels, rows: int) -> Array:
    """A sample's label as numbers, one a row; names of classes become their index.

    Raises:
        RemoteError: another number of rows, or a name that is no class of the model.
    """
    each = [label] if isinstance(label, str | int | float) else list(label)
    if len(each) != rows:
        raise RemoteError(f"{len(each)} labels for {rows} rows")
    try:
        return np.array([export.labels.index(x) if isinstance(x, str) else float(x) for x in each])
    except (ValueError, TypeError, OverflowError) as exc:
        raise RemoteError(f"label {label!r} is no number and no class", f"Classes: {', '.join(export.labels)}") from exc
