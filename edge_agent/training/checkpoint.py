"""Where a task stands, on disk: a trainer that is killed goes on at its step."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fabric.errors import MalformedMessage
from fabric.tensors import Tensor, decode, encode

Array = npt.NDArray[Any]
_PLACE = "\x01place"
_LOSSES = "\x01losses"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """After `steps` steps over a source of `samples` samples; `losses` are those of the epoch that is under way."""

    steps: int
    samples: int
    losses: tuple[float, ...]
    values: Mapping[str, Array]

    def write(self, file: Path) -> None:
        """Whole or not at all."""
        part = file.with_suffix(".part")
        place = Tensor.of(_PLACE, np.array([self.steps, self.samples], np.int64))
        losses = Tensor.of(_LOSSES, np.array(self.losses, np.float64))
        with part.open("wb") as out:
            out.writelines(encode([place, losses, *(Tensor.of(k, v) for k, v in self.values.items())]))
            out.flush()
            os.fsync(out.fileno())
        part.replace(file)

    @classmethod
    def read(cls, file: Path, samples: int, expected: Mapping[str, Array]) -> Checkpoint | None:
        """What `write` wrote; None if there is nothing, or it is of other data or another graph."""
        try:
            found = {t.name: t.numpy() for t in decode(file.read_bytes())}
            steps, over = (int(n) for n in found.pop(_PLACE))
            losses = tuple(float(n) for n in found.pop(_LOSSES))
        except (FileNotFoundError, MalformedMessage, KeyError, ValueError):
            return None
        shapes = {k: (v.shape, v.dtype) for k, v in found.items()}
        if over != samples or shapes != {k: (v.shape, v.dtype) for k, v in expected.items()}:
            return None
        return cls(steps, over, losses, found)
