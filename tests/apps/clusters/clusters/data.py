"""Three clouds of points; each node has its own. numpy only."""

import time
from pathlib import Path

import numpy as np

from fedtide.edge_agent.samples.source import Columns


class Held(Columns):
    """Stops at its sixth batch, and says so, while the file `hold` is there."""

    def __init__(self, columns, hold):
        super().__init__(columns)
        self._hold, self._reads = Path(hold).expanduser(), 0

    def read(self, indices):
        self._reads += 1
        while self._reads > 6 and self._hold.exists():
            self._hold.with_suffix(".reached").touch()
            time.sleep(0.02)
        return super().read(indices)


def of_node(node, run):
    generator = np.random.default_rng(int(node["partition-id"]))
    labels = generator.integers(0, 3, 50)
    points = np.eye(3, 4)[labels] + generator.normal(0, 0.4, (50, 4))
    columns = {"point": points.astype(np.float32), "label": labels}
    return Held(columns, run["hold"]) if run["hold"] else Columns(columns)
