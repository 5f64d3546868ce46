"""A strategy of the app's own package `aggregation`; leaves the result in final.npz."""

import numpy as np
from aggregation.halved import HalvedAvg
from flwr.app import Array, ArrayRecord, Context
from flwr.serverapp import Grid, ServerApp

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    arrays = ArrayRecord({"w": Array(np.zeros(3, np.float32))})
    rounds = int(context.run_config["num-server-rounds"])
    result = HalvedAvg(fraction_evaluate=0.0).start(grid=grid, initial_arrays=arrays, num_rounds=rounds)
    np.savez("final.npz", **{k: a.numpy() for k, a in result.arrays.items()})
