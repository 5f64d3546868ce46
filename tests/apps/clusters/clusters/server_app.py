import numpy as np
from flwr.app import ArrayRecord
from flwr.serverapp import ServerApp
from flwr.serverapp.strategy import FedAvg

from clusters import model

app = ServerApp()


@app.main()
def main(grid, context):
    strategy = FedAvg(fraction_evaluate=1.0)
    initial = ArrayRecord(model.make(context.run_config["seed"]).state_dict())
    result = strategy.start(grid=grid, initial_arrays=initial, num_rounds=context.run_config["num-server-rounds"])
    np.savez("final.npz", **{name: array.numpy() for name, array in result.arrays.items()})
