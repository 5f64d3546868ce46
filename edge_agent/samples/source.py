"""Where training apps and scores get a node's samples from.

A `DataSource` is the interface for a user's own data; `CapturedSamples` is the node's sample store.
An app finds the store's path in its node config, under `SAMPLES`:

    source = CapturedSamples.open(str(context.node_config["fedtide-samples"]), "digits")
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from fedtide.edge_agent.samples.store import SampleStore
from fedtide.edge_agent.serving.scoring import Array
from fedtide.fabric.errors import NotFound

SAMPLES = "fedtide-samples"
LABEL = "label"


class DataSource(Protocol):
    """Labelled samples of this node. Their order and number stay fixed while the source is open."""

    def __len__(self) -> int:
        """How many samples there are."""
        ...

    def read(self, indices: Sequence[int]) -> dict[str, Array]:
        """Samples as columns: one array an input, and `label`; the first axis is the sample.

        Raises:
            IndexError: an index is not below `len`.
        """
        ...


class Columns:
    """Samples that are in memory already, as columns of one length."""

    def __init__(self, columns: dict[str, Array]) -> None:
        self._columns = columns

    def __len__(self) -> int:
        return min((len(column) for column in self._columns.values()), default=0)

    def read(self, indices: Sequence[int]) -> dict[str, Array]:
        return {name: column[np.asarray(indices, np.int64)] for name, column in self._columns.items()}


class CapturedSamples:
    """The labelled samples that the node captured for one model when it is opened; those deleted since are left out."""

    def __init__(self, store: SampleStore, model: str) -> None:
        self._store = store
        self._rows = store.labelled_rows(model)

    @classmethod
    def open(cls, file: str, model: str) -> CapturedSamples:
        """Raises NotFound if this node has captured nothing."""
        if not Path(file).exists():
            raise NotFound(f"there is no sample store at {file}", "Set capture.share in the agent's configuration")
        return cls(SampleStore(Path(file), 2**62, float("inf")), model)

    def __len__(self) -> int:
        return len(self._rows)

    def read(self, indices: Sequence[int]) -> dict[str, Array]:
        wanted = [self._rows[i] for i in indices]
        kept = {number: self._store.read(number) for number in {number for number, _ in wanted}}
        found = [(sample, row) for number, row in wanted if (sample := kept[number]) is not None]
        if not found:
            return {}
        columns = {
            name: np.concatenate([s.inputs[name][row : row + 1] for s, row in found]) for name in found[0][0].inputs
        }
        labels = [s.label[row] if isinstance(s.label, list) else s.label for s, row in found]
        return {**columns, LABEL: np.array(labels)}
