"""Adds partition + 1 to every weight. The first node (or everyone) takes `delay` seconds; its state counts calls.

Each training leaves a line in journal.txt of the run's folder: run, round, and when it began.
"""

import time
from pathlib import Path

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    with Path("journal.txt").open("a") as journal:
        number = message.content.config_records["config"]["server-round"]
        journal.write(f"{context.run_id} {number!s} {time.time()}\n")
    seen = int(context.state.config_records.get("memory", ConfigRecord({"calls": 0}))["calls"]) + 1
    context.state["memory"] = ConfigRecord({"calls": seen})
    if context.node_config["partition-id"] == 0 or context.run_config["everyone"]:
        time.sleep(float(context.run_config["delay"]))
    step = int(context.node_config["partition-id"]) + 1
    old = {k: a.numpy() for k, a in message.content["arrays"].items()}
    weights = {k: Array(np.asarray(a + step, a.dtype)) for k, a in old.items()}
    metrics = MetricRecord({"num-examples": 1, "calls": seen, "pid": float(step)})
    print("a ClientApp may print")
    return Message(RecordDict({"arrays": ArrayRecord(weights), "metrics": metrics}), reply_to=message)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    total = float(sum(a.numpy().sum() for a in message.content["arrays"].values()))
    return Message(RecordDict({"metrics": MetricRecord({"total": total, "num-examples": 1})}), reply_to=message)
