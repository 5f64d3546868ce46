"""Answers as the case says; deterministic, different on each node, with a state that counts."""

import json
import logging
import math
import time
from functools import partial

import numpy as np
from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.clientapp.mod import adaptiveclipping_mod, arrays_size_mod, fixedclipping_mod, message_size_mod

CASE_MODS = {
    "fixed": [fixedclipping_mod],
    "adaptive": [adaptiveclipping_mod],
    "sizes": [arrays_size_mod, message_size_mod],
}


def chosen(message: Message, context: Context, call) -> Message:
    """The mods of the case, around whatever function is called."""
    for mod in reversed(CASE_MODS.get(options(context).get("mods", ""), [])):
        call = partial(mod, call_next=call)
    return call(message, context)


app = ClientApp(mods=[chosen])


def partition(context: Context) -> int:
    return int(context.node_config["partition-id"])


def options(context: Context) -> dict:
    return json.loads(str(context.run_config["options"]))


def count(context: Context) -> int:
    seen = int(context.state.metric_records.get("seen", MetricRecord({"n": 0}))["n"]) + 1
    context.state["seen"] = MetricRecord({"n": seen})
    return seen


def learnt(given: ArrayRecord, asked: dict, number: int, seen: int) -> dict[str, Array]:
    """What this node makes of the arrays that it was given."""
    if "booster" in asked:
        return {"0": Array(np.frombuffer(booster(number, seen), np.uint8))}
    if "ragged" in asked:
        return {"ragged": Array(np.arange(number + 1, dtype=np.float32))}
    if asked.get("initialises") and not given:
        return {"w": Array(np.full(4, number, np.float64)), "b": Array(np.asarray(number, np.float32))}
    moved = {key: Array(step(array.numpy(), number)) for key, array in given.items()}
    return {key: moved[key] for key in asked["only"]} if "only" in asked else moved


@app.train()
def train(message: Message, context: Context) -> Message:
    number, asked = partition(context), options(context)
    name = next(iter(message.content.array_records), "arrays")
    given = message.content[name] if name in message.content else ArrayRecord()
    seen = count(context)
    behave(asked)
    if seen == asked.get("fails_once"):
        raise RuntimeError("this time")
    if number in asked.get("raises", []):
        raise KeyError("rows")
    moved = learnt(given, asked, number, seen)
    metrics = {"num-examples": asked.get("examples", [1, 2, 3, 4])[number], "seen": seen}
    metrics["loss"] = metrics["train_loss"] = 1.0 / (number + seen)
    if asked.get("remembers"):
        metrics["remembered"] = remembered()
    if asked.get("lists"):
        metrics["per-class"] = [float(number), 0.5, 2.0] * int(asked["lists"])
    if number == 1 and "odd" in asked:
        spoil(asked["odd"], moved, metrics)
    if asked.get("odd") == "forgets":
        return None  # type: ignore[return-value]
    return Message(RecordDict({name: ArrayRecord(moved), "metrics": MetricRecord(metrics)}), reply_to=message)


def step(found: np.ndarray, number: int) -> np.ndarray:
    if found.dtype.kind in "fc":
        return np.asarray(found + np.asarray(number + 1, found.dtype) / 3, found.dtype)
    return np.asarray(found + number, found.dtype) if found.dtype.kind in "iu" else found


def behave(asked: dict) -> None:
    time.sleep(asked.get("seconds", 0))
    if asked.get("prints"):
        print("the client printed this")
        logging.getLogger("referee").error("the client logged this")


def remembered() -> int:
    """How often this was asked in this process, by what is left in a module of Python's own."""
    vars(math)["asked_by_referee"] = vars(math).get("asked_by_referee", 0) + 1
    return int(vars(math)["asked_by_referee"])


def spoil(odd: str, moved: dict, metrics: dict) -> None:
    if odd == "train":
        del metrics["loss"]
    elif odd == "weight":
        metrics["num-examples"] = float("nan")
    elif odd == "nan":
        moved["t0"] = Array(np.full((2, 3), np.nan, np.float32))
    elif odd == "shape":
        moved["t0"] = Array(np.zeros((3, 3), np.float32))


def booster(number: int, seen: int) -> bytes:
    trees = [{"id": 0, "weights": [number, seen] * (number + 1)}]  # no two are of one length
    model = {"gbtree_model_param": {"num_trees": "1", "num_parallel_tree": "1"}, "trees": trees}
    model |= {"iteration_indptr": [0, 1], "tree_info": [0]}
    return json.dumps({"learner": {"gradient_booster": {"model": model}}}).encode()


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    number, asked = partition(context), options(context)
    (given,) = message.content.array_records.values()
    total = sum(
        float(np.abs(a.numpy()).astype(np.float64).sum()) for a in given.values() if a.numpy().dtype.kind in "fiu"
    )
    metrics = {"num-examples": asked.get("evaluated", [4, 3, 2, 1])[number], "total": total, "seen": count(context)}
    if number == 1 and asked.get("odd") == "evaluate":
        metrics["only here"] = 1
    return Message(RecordDict({"metrics": MetricRecord(metrics)}), reply_to=message)


@app.train("warmup")
def warmup(message: Message, context: Context) -> Message:
    return train_like(message, context, 100)


@app.query()
def query(message: Message, context: Context) -> Message:
    return train_like(message, context, 1)


@app.query("again")
def again(message: Message, context: Context) -> Message:
    return train_like(message, context, 10)


def train_like(message: Message, context: Context, step: int) -> Message:
    """Any record comes back, arrays moved by a step, beside what the node is."""
    content = {}
    for name, record in message.content.items():
        if isinstance(record, ArrayRecord):
            record = ArrayRecord({k: Array(a.numpy() + a.numpy().dtype.type(step)) for k, a in record.items()})
        content[name] = record
    about = {"partition": partition(context), "seen": count(context), "num-examples": 1 + partition(context)}
    return Message(RecordDict({**content, "about": MetricRecord(about)}), reply_to=message)
