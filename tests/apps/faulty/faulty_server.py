"""FedAvg that would be poisoned, or would raise, if a bad update reached it."""

import numpy as np
from flwr.app import Array, ArrayRecord, Context
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    arrays = ArrayRecord({"w": Array(np.zeros(int(context.run_config["size"]), np.float32))})
    result = FedAvg(fraction_evaluate=0.0, min_available_nodes=1).start(
        grid=grid, initial_arrays=arrays, num_rounds=int(context.run_config["num-server-rounds"])
    )
    np.savez("final.npz", **{k: a.numpy() for k, a in result.arrays.items()})
