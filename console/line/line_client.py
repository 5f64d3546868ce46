"""A node's share: steps of gradient descent towards its own points."""

from __future__ import annotations

from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

app = ClientApp()

POINTS = 64


def _points(context: Context) -> tuple[Any, Any]:
    """On y = 3x - 1, with noise; other ones on each node."""
    random = np.random.default_rng(int(context.node_id) % 2**32)
    x = random.uniform(-1, 1, (POINTS, 1)).astype(np.float32)
    return x, 3 * x - 1 + random.normal(0, 0.01, x.shape).astype(np.float32)


def _received(message: Message) -> tuple[Any, Any]:
    arrays = message.content.array_records["arrays"]
    return arrays["slope"].numpy(), arrays["offset"].numpy()


@app.train()
def train(message: Message, context: Context) -> Message:
    (x, y), (slope, offset) = _points(context), _received(message)
    rate = np.float32(str(context.run_config["learning-rate"]))
    for _ in range(int(str(context.run_config["steps"]))):
        error = x @ slope + offset - y
        slope = slope - rate * 2 * (x.T @ error) / len(x)
        offset = offset - rate * 2 * error.mean(axis=0)
    loss = float(np.mean((x @ slope + offset - y) ** 2))
    arrays = ArrayRecord({"slope": Array(slope), "offset": Array(offset)})
    metrics = MetricRecord({"train_loss": loss, "num-examples": len(x)})
    return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    (x, y), (slope, offset) = _points(context), _received(message)
    loss = float(np.mean((x @ slope + offset - y) ** 2))
    metrics = MetricRecord({"loss": loss, "num-examples": len(x)})
    return Message(RecordDict({"metrics": metrics}), reply_to=message)
