"""The node with partition 0 misbehaves as the run config's `mode` says."""

import os

import numpy as np
from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    arrays = message.content["arrays"]
    mode = str(context.run_config["mode"]) if context.node_config["partition-id"] == 0 else "none"
    weights = arrays["w"].numpy() + 1
    if mode == "raise":
        raise ValueError("this node has no data")
    if mode == "exit":
        os._exit(3)
    if mode == "import":
        import a_module_that_is_not_there  # noqa: F401
    if mode == "shape":
        weights = weights[:-1]
    if mode == "nan":
        weights[0] = np.nan
    if mode == "dtype":
        weights = weights.astype(np.float64)
    if mode == "hang":
        import time

        time.sleep(600)
    name = "other" if mode == "name" else "w"
    content = RecordDict({"arrays": ArrayRecord({name: Array(weights)}), "metrics": MetricRecord({"num-examples": 1})})
    return Message(content, reply_to=message)
