"""Adds the step that the app's own package `aggregation` names."""

import numpy as np
from aggregation.halved import STEP
from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    arrays = {k: Array(np.asarray(a.numpy() + STEP, np.float32)) for k, a in message.content["arrays"].items()}
    metrics = MetricRecord({"num-examples": 1})
    return Message(RecordDict({"arrays": ArrayRecord(arrays), "metrics": metrics}), reply_to=message)
