"""The checkpoint of a task on disk, from which a killed trainer resumes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fedtide.fabric.errors import MalformedMessage
from fedtide.fabric.process.files import map_file, write_atomically
from fedtide.fabric.tensors.frame import Tensor, decode, encode
from fedtide.fabric.tensors.training_bundle import BundleTensor

Array = npt.NDArray[Any]
_PLACE = "\x01place"
_LOSSES = "\x01losses"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """The state after `steps` steps over `samples` samples; `losses` are those of the current epoch."""

    steps: int
    samples: int
    losses: tuple[float, ...]
    values: Mapping[str, Array]

    def write(self, file: Path) -> None:
        """Write the checkpoint atomically."""
        place = Tensor.of(_PLACE, np.array([self.steps, self.samples], np.int64))
        losses = Tensor.of(_LOSSES, np.array(self.losses, np.float64))
        write_atomically(file, encode([place, losses, *(Tensor.of(k, v) for k, v in self.values.items())]))

    @classmethod
    def read(cls, file: Path, samples: int, expected: Mapping[str, BundleTensor]) -> Checkpoint | None:
        """The stored checkpoint; None if there is none, or it belongs to other data or another graph."""
        try:
            found = {t.name: t for t in decode(map_file(file))}
            steps, over = (int(n) for n in found.pop(_PLACE).numpy())
            losses = tuple(float(n) for n in found.pop(_LOSSES).numpy())
        except (FileNotFoundError, MalformedMessage, KeyError, ValueError):
            return None
        forms = {name: (tensor.shape, tensor.dtype) for name, tensor in found.items()}
        if over != samples or forms != {name: (spec.shape, spec.dtype) for name, spec in expected.items()}:
            return None
        return cls(steps, over, losses, {name: tensor.numpy() for name, tensor in found.items()})
