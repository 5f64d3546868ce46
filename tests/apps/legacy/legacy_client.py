"""Flower's legacy client API."""

import numpy as np
from flwr.client import ClientApp, NumPyClient
from flwr.common import Context


class Client(NumPyClient):
    def fit(self, parameters, config):
        return [p + 2 for p in parameters], 1, {"seen": 1}

    def evaluate(self, parameters, config):
        return float(np.sum(parameters[0])), 1, {"accuracy": 0.5}


def client_fn(context: Context):
    return Client().to_client()


app = ClientApp(client_fn)
