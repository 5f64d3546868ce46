"""Answers in float32 and int64 whatever precision the global model has by now, as torch clients do."""

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.client.mod import secaggplus_mod
from flwr.clientapp import ClientApp


def not_for_queries(message, context, call_next):
    if message.metadata.message_type.startswith("query") or context.run_config["case"] != "secagg":
        return call_next(message, context)
    return secaggplus_mod(message, context, call_next)


app = ClientApp()


@app.train(mods=[not_for_queries])
def train(message: Message, context: Context) -> Message:
    if context.run_config["case"] == "secagg":
        from flwr.common import Code, FitRes, Status, ndarrays_to_parameters
        from flwr.compat.common.recorddict_compat import fitres_to_recorddict

        result = FitRes(Status(Code.OK, ""), ndarrays_to_parameters([np.full(50_000, 2.0)]), 1, {})
        return Message(fitres_to_recorddict(result, keep_input=False), reply_to=message)
    weights = {k: a.numpy() for k, a in message.content["arrays"].items()}
    arrays = {
        "w": Array(weights["w"].astype(np.float32) + 1),
        "n": Array(np.asarray(weights["n"] + 2, np.int64)),
    }
    metrics = MetricRecord({"num-examples": 1})
    return Message(RecordDict({"arrays": ArrayRecord(arrays), "metrics": metrics}), reply_to=message)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    return Message(RecordDict({"metrics": MetricRecord({"seen": 1, "num-examples": 1})}), reply_to=message)


@app.query()
def query(message: Message, context: Context) -> Message:
    content = RecordDict(
        {
            "large": ConfigRecord({"raw": b"\x07" * 9_000_000, "text": ["x" * 40_000] * 3}),
            "odd": ArrayRecord({"c": Array(np.array([1 + 2j], np.complex64)), "s": Array(np.array(["ä", "bc"]))}),
            "second": ArrayRecord({"e": Array(np.zeros((0, 2), np.float16))}),
            "echo": message.content["large"],
        }
    )
    return Message(content, reply_to=message)
