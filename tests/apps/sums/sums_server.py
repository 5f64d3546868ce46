"""One of our strategies over `size` float32 weights, a scalar and a counter; leaves final.npz below `out`."""

import json

import numpy as np
from flwr.app import Array, ArrayRecord, Context
from flwr.serverapp import Grid, ServerApp

from fedtide.aggregation import strategies

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    start = {"w": np.zeros(int(context.run_config["size"]), "f4"), "b": np.zeros((), "f8"), "n": np.zeros((), "i8")}
    kind = getattr(strategies, str(context.run_config["strategy"]))
    strategy = kind(fraction_evaluate=0.0, **json.loads(str(context.run_config["options"])))
    result = strategy.start(
        grid, ArrayRecord({k: Array(v) for k, v in start.items()}), int(context.run_config["num-server-rounds"])
    )
    np.savez(str(context.run_config["out"]) + "final.npz", **{k: a.numpy() for k, a in result.arrays.items()})
