"""FedAvg over all nodes, scored on points of the line itself."""

from __future__ import annotations

import numpy as np
from flwr.app import Array, ArrayRecord, Context, MetricRecord
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

app = ServerApp()

CLOSE = 0.1
"""So near a point is met, in `accuracy`."""


def _score(_: int, arrays: ArrayRecord) -> MetricRecord:
    x = np.linspace(-1, 1, 101, dtype=np.float32)[:, None]
    error = x @ arrays["slope"].numpy() + arrays["offset"].numpy() - (3 * x - 1)
    return MetricRecord({"loss": float(np.mean(error**2)), "accuracy": float(np.mean(np.abs(error) < CLOSE))})


@app.main()
def main(grid: Grid, context: Context) -> None:
    start = {"slope": np.zeros((1, 1), np.float32), "offset": np.zeros(1, np.float32)}
    FedAvg(fraction_evaluate=0.0, min_train_nodes=1, min_available_nodes=1).start(
        grid=grid,
        initial_arrays=ArrayRecord({name: Array(array) for name, array in start.items()}),
        num_rounds=int(str(context.run_config["num-server-rounds"])),
        evaluate_fn=_score,
    )
