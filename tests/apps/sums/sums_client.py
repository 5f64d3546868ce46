"""Moves every weight by a draw that is seeded by node and round; the `poisoned` node lies in its last weight.

The first node takes `delay` seconds, and `burn` seconds of CPU time."""

import time

import numpy as np
from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

app = ClientApp()

LIES = {"nan": np.nan, "huge": 3e38, "far": 1e3}


def moved(arrays: dict, pid: int, round_: int) -> dict:
    rng = np.random.default_rng((pid, round_))
    steps = {"w": rng.standard_normal(arrays["w"].shape), "b": rng.standard_normal(), "n": pid}
    kinds = {"w": "f4", "b": "f8", "n": "i8"}
    return {k: np.asarray(arrays[k] + steps[k]).astype(kinds[k]) for k in kinds}


@app.train()
def train(message: Message, context: Context) -> Message:
    pid = int(context.node_config["partition-id"])
    if pid == 0:
        time.sleep(float(context.run_config["delay"]))
        until = time.process_time() + float(context.run_config["burn"])
        while time.process_time() < until:
            pass
    arrays = {k: a.numpy() for k, a in message.content["arrays"].items()}
    new = moved(arrays, pid, int(message.content["config"]["server-round"]))
    if pid == context.run_config["poisoned"]:
        new["w"][-1] = LIES[str(context.run_config["lie"])]
    metrics = MetricRecord({"num-examples": 10 * (pid + 1), "num-steps": pid + 1})
    record = ArrayRecord({k: Array(v) for k, v in new.items()})
    return Message(RecordDict({"arrays": record, "metrics": metrics}), reply_to=message)
