"""Every strategy and wrapper of flwr, and mains that use the grid themselves; trace.json is what came of it."""

import json
import logging
import random
import time

import numpy as np
import referee_traces as traces
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp import strategy as strategies
from flwr.serverapp.strategy.strategy_utils import aggregate_arrayrecords

app = ServerApp()
STEPS = ("configure_train", "aggregate_train", "configure_evaluate", "aggregate_evaluate")
EVERYONE = {"min_train_nodes": 4, "min_evaluate_nodes": 4, "min_available_nodes": 4}


@app.main()
def main(grid: Grid, context: Context) -> None:
    config = context.run_config
    random.seed(7)
    np.random.seed(7)
    trace: dict = {"calls": []}
    if json.loads(str(config["options"])).get("prints"):
        print("\x1b[32mthe server printed this\x1b[0m")
        logging.getLogger("referee").warning("the server logged this")
    try:
        case = MAINS.get(str(config["case"]), learn)
        trace |= case(grid, config, json.loads(str(config["options"])), trace["calls"])
    except Exception as exc:
        trace["exception"] = f"{type(exc).__name__}: {str(exc)[:120]}"
        raise
    finally:
        with open("trace.json", "w") as file:
            json.dump(trace, file)


def start_of(options: dict) -> ArrayRecord:
    kinds = options.get("dtypes", ["float32", "float64", "int64"])
    arrays = {f"t{n}": Array(np.asarray(np.arange(6).reshape(2, 3), kind)) for n, kind in enumerate(kinds)}
    if options.get("booster"):
        arrays = {"0": Array(np.frombuffer(b"", np.uint8))}
    if options.get("infinite"):
        arrays["mask"] = Array(np.asarray([0.0, -np.inf, 1.0], np.float32))
    return ArrayRecord({} if options.get("empty") else arrays)


def strategy_of(name: str, options: dict, calls: list):
    kwargs = options.get("kwargs", {}) if options.get("alone") else {**EVERYONE, **options.get("kwargs", {})}
    inner = getattr(strategies, name.split("+")[0])(**kwargs)
    if "+" in name:
        inner = getattr(strategies, name.split("+")[1])(inner, **options["dp"])
    return recorded(inner, calls)


def recorded(strategy, calls: list):
    """The strategy, with a note of each step: what it asks, and the replies that it sees."""
    for step in STEPS:
        setattr(strategy, step, noted(step, getattr(strategy, step), calls))
    return strategy


def noted(step: str, method, calls: list):
    def configure(number, arrays, config, grid):
        messages = list(method(number, arrays, config, grid))
        asked = [[m.metadata.dst_node_id, m.metadata.message_type, traces.content(m.content)] for m in messages]
        calls.append([step, number, sorted(asked, key=lambda each: each[0])])
        return messages

    def aggregate(number, replies):
        replies = list(replies)
        calls.append([step, number, sorted((traces.reply(r) for r in replies), key=lambda each: each["node"])])
        return method(number, replies)

    return configure if step.startswith("configure") else aggregate


def learn(grid: Grid, config, options: dict, calls: list) -> dict:
    found, arrays = {}, start_of(options)
    for number, name in enumerate(str(config["case"]).split(",")):
        strategy = strategy_of(name, options, calls)
        evaluate = (lambda n, a: MetricRecord({"size": len(a), "round": n})) if options.get("central") else None
        result = strategy.start(
            grid,
            arrays,
            num_rounds=int(config["num-server-rounds"]),
            train_config=ConfigRecord({"lr": 0.5}),
            evaluate_fn=evaluate,
        )
        arrays = result.arrays
        found[f"result-{number}"] = {"arrays": traces.arrays(result.arrays), "histories": traces.histories(result)}
    return found


def asks(grid: Grid, config, options: dict, calls: list) -> dict:
    """Several kinds of messages, several to one node, records of any kind; the answers by the question they answer."""
    nodes = sorted(grid.get_node_ids())
    content = RecordDict(
        {
            "arrays": start_of(options),
            "more": ArrayRecord({"e": Array(np.zeros((0, 2), np.float16)), "c": Array(np.asarray([1 + 2j]))}),
            "config": ConfigRecord({"raw": b"\x00\xff" * 9, "text": "ä", "flag": True, "many": [1, 2], "none": []}),
            "metrics": MetricRecord({"x": 0.1, "y": 3, "list": [1.0, float("inf")]}),
        }
    )
    found = []
    for kinds in (["query"], ["query", "query.again"], ["train.warmup", "evaluate", "query.missing"]):
        messages = [
            Message(content if k != "evaluate" else RecordDict({"arrays": start_of(options)}), n, k)
            for k in kinds
            for n in nodes
        ]
        replies = grid.send_and_receive(messages, timeout=60)
        assert isinstance(replies, list)
        found.append(sorted(map(json.dumps, map(traces.reply, replies))))
    return {"replies": found, "nothing": list(grid.send_and_receive([]))}


def pushes(grid: Grid, config, options: dict, calls: list) -> dict:
    """Push, then pull until all are there; an id that was pulled is gone."""
    nodes = sorted(grid.get_node_ids())
    ids = list(grid.push_messages([Message(RecordDict({"arrays": start_of(options)}), n, "query") for n in nodes]))
    replies: list = []
    until = time.monotonic() + 60
    while len(replies) < len(ids) and time.monotonic() < until:
        replies += grid.pull_messages(ids)
        time.sleep(0.02)
    answered = {r.metadata.reply_to_message_id for r in replies}
    return {
        "all": answered == set(ids),
        "again": len(list(grid.pull_messages(ids))),
        "unlike": len(set(ids)),
        "replies": sorted(map(json.dumps, map(traces.reply, replies))),
    }


def leaves(grid: Grid, config, options: dict, calls: list) -> dict:
    """Push, and wait for nothing."""
    nodes = sorted(grid.get_node_ids())
    return {"pushed": len(list(grid.push_messages([Message(RecordDict(), n, "query") for n in nodes])))}


def wrapped(grid: Grid, config, options: dict, calls: list) -> dict:
    """A strategy on a grid that the app has wrapped."""

    class Counting(Grid):
        set_run = run = create_message = push_messages = pull_messages = None

        def get_node_ids(self):
            return grid.get_node_ids()

        def send_and_receive(self, messages, *, timeout=None):
            calls.append(["send_and_receive"])
            return grid.send_and_receive(messages, timeout=timeout)

    strategy = recorded(strategies.FedAvg(**EVERYONE), [])
    result = strategy.start(Counting(), start_of(options), num_rounds=1)
    inner = grid.send_and_receive

    def patched(*args, **kwargs):
        calls.append(["patched"])
        return inner(*args, **kwargs)

    grid.send_and_receive = patched
    again = strategies.FedAvg(**EVERYONE).start(grid, result.arrays, num_rounds=1)
    return {"arrays": traces.arrays(again.arrays)}


class Asking(strategies.FedAvg):
    """Asks nodes something else while it configures its training."""

    def configure_train(self, server_round, arrays, config, grid):
        nodes = sorted(grid.get_node_ids())
        replies = grid.send_and_receive([Message(RecordDict(), n, "query") for n in nodes])
        self.heard = sorted(r.metadata.src_node_id for r in replies)
        return super().configure_train(server_round, arrays, config, grid)


class Saving(strategies.FedAvg):
    """Overrides both methods, as tutorials do."""

    def configure_train(self, server_round, arrays, config, grid):
        config["lr"] = 0.1 * server_round
        return super().configure_train(server_round, arrays, config, grid)

    def aggregate_train(self, server_round, replies):
        replies = list(replies)
        arrays, metrics = super().aggregate_train(server_round, replies)
        return arrays, metrics


class Warmup(strategies.FedAvg):
    """Trains with a function of another name."""

    def configure_train(self, server_round, arrays, config, grid):
        messages = list(super().configure_train(server_round, arrays, config, grid))
        for message in messages:
            message.metadata.message_type = "train.warmup"
        return messages

    def aggregate_train(self, server_round, replies):
        for reply in (replies := list(replies)):
            if reply.has_content():
                del reply.content["config"]
        return super().aggregate_train(server_round, replies)


class Twice(strategies.FedAvg):
    """Two messages to each node in one phase."""

    def configure_train(self, server_round, arrays, config, grid):
        return [m for _ in range(2) for m in super(Twice, self).configure_train(server_round, arrays, config, grid)]


class Copied(strategies.FedAvg):
    """A copy of Flower's method, as people make to add a line: it calls Flower's function itself."""

    def aggregate_train(self, server_round, replies):
        contents = [r.content for r in sorted(replies, key=lambda r: r.metadata.src_node_id) if r.has_content()]
        return aggregate_arrayrecords(contents, self.weighted_by_key), None


class Stacking(strategies.FedAvg):
    """Puts what nodes send one after the other, whatever its length: it averages nothing."""

    def aggregate_train(self, server_round, replies):
        good, _ = self._check_and_log_replies(replies, is_train=True)
        parts = [
            reply.content["arrays"]["ragged"].numpy() for reply in sorted(good, key=lambda r: r.metadata.src_node_id)
        ]
        return ArrayRecord({"ragged": Array(np.concatenate(parts))}), None


class Broken(strategies.FedAvg):
    def aggregate_train(self, server_round, replies):
        raise LookupError("the app's own error")


for own in (Copied, Asking, Saving, Warmup, Twice, Stacking, Broken):
    setattr(strategies, own.__name__, own)
MAINS = {"asks": asks, "pushes": pushes, "leaves": leaves, "wrapped": wrapped}
