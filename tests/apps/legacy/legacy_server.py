"""Flower's legacy server API: `server_fn`, strategy with aggregate_fit."""

import numpy as np
from flwr.common import Context, ndarrays_to_parameters
from flwr.server import ServerApp, ServerAppComponents, ServerConfig
from flwr.server.strategy import FedAvg


def server_fn(context: Context):
    strategy = FedAvg(min_available_clients=2, initial_parameters=ndarrays_to_parameters([np.zeros(6, np.float32)]))
    return ServerAppComponents(
        strategy=strategy, config=ServerConfig(num_rounds=int(context.run_config["num-server-rounds"]))
    )


app = ServerApp(server_fn=server_fn)
