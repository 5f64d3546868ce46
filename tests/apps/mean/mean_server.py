"""A strategy of flwr, or `ours.NAME`, over `size` float32 weights and a scalar; leaves the result in final.npz."""

import numpy as np
from flwr.app import Array, ArrayRecord, Context, MetricRecord
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp import strategy as strategies

from fedtide.aggregation import strategies as ours

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    size = int(context.run_config["size"])
    arrays = ArrayRecord({"w": Array(np.zeros(size, np.float32)), "b": Array(np.zeros((), np.float64))})
    home, _, name = str(context.run_config["strategy"]).rpartition(".")
    strategy = getattr(ours if home == "ours" else strategies, name)(
        fraction_train=float(context.run_config["fraction"]), fraction_evaluate=1.0
    )
    result = strategy.start(
        grid=grid,
        initial_arrays=arrays,
        num_rounds=int(context.run_config["num-server-rounds"]),
        evaluate_fn=lambda _, a: MetricRecord({"mean": float(a["w"].numpy().mean())}),
    )
    np.savez("final.npz", **{k: a.numpy() for k, a in result.arrays.items()})
