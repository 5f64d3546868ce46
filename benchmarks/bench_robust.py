"""Robust rules on N updates of one float32 tensor: ours, Flower's strategies, byzfl; and against our own mean.

Ours and Flower's are whole strategies (checks, metrics); byzfl's are the bare rules, in its own environment.
"""

from __future__ import annotations

import json
import logging
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import strategy as flowers

from benchmarks import byzfl_environment
from benchmarks.report import Row, load_now, write
from fedtide.aggregation import strategies as ours
from fedtide.fabric.flower import bridge as flower
from tests.offline_grid import OfflineGrid

SIZES = [(10, 1_000_000), (32, 1_000_000)]
REPEATS = 3


def _replies(strategy: Any, base: ArrayRecord, updates: list[ArrayRecord]) -> list[Message]:
    replies = []
    sent = strategy.configure_train(1, base, ConfigRecord(), OfflineGrid(len(updates)))
    for message, update in zip(sent, updates, strict=True):
        flower.stamp(message, f"t{message.metadata.dst_node_id}")
        # A record of its own for each round: Flower's rules take arrays out of the replies.
        content = {"arrays": ArrayRecord(dict(update)), "metrics": MetricRecord({"num-examples": 1})}
        replies.append(Message(RecordDict(content), reply_to=message))
    return replies


def _seconds(make: Callable[[], Any], base: ArrayRecord, updates: list[ArrayRecord]) -> float:
    times = []
    for _ in range(REPEATS + 1):
        strategy = make()
        replies = _replies(strategy, base, updates)
        began = time.perf_counter()
        strategy.aggregate_train(1, replies)
        times.append(time.perf_counter() - began)
    return statistics.median(times[1:])


def _measure(count: int, elements: int) -> list[Row]:
    rng = np.random.default_rng(0)
    base = ArrayRecord({"w": Array(np.zeros(elements, np.float32))})
    updates = [ArrayRecord({"w": Array(rng.standard_normal(elements, dtype=np.float32))}) for _ in range(count)]
    few = {"min_train_nodes": count, "min_available_nodes": count}
    f, name = count // 5, f"{count} x {elements}"
    mean = _seconds(lambda: ours.FedAvg(**few), base, updates)
    byzfl = json.loads(byzfl_environment.run("time", str(count), str(elements)))
    krum = {"num_malicious_nodes": f, "num_nodes_to_select": count - f}
    rules: dict[str, tuple[Callable[[], Any], Callable[[], Any] | None]] = {
        "median": (lambda: ours.CoordinateMedian(**few), lambda: flowers.FedMedian(**few)),
        "trimmed": (lambda: ours.TrimmedMean(**few), lambda: flowers.FedTrimmedAvg(**few)),
        "multikrum": (lambda: ours.MultiKrum(**few, **krum), lambda: flowers.MultiKrum(**few, **krum)),
        "clipping": (lambda: ours.CentredClipping(radius=100.0, **few), None),
    }
    rows = []
    for rule, (mine, theirs) in rules.items():
        own = _seconds(mine, base, updates)
        rows.append(Row(name, rule, "s", own, mean, "our own mean"))
        rows.append(Row(name, rule, "s", own, byzfl[rule], f"byzfl {byzfl_environment.VERSION}"))
        if theirs is not None:
            rows.append(Row(name, rule, "s", own, _seconds(theirs, base, updates), "Flower"))
    return rows


def main() -> None:
    load = load_now()
    logging.getLogger("flwr").setLevel(logging.ERROR)
    flower.adopt_identity(1, flower.SUPERLINK_NODE_ID)
    write("robust", load, [row for count, elements in SIZES for row in _measure(count, elements)])


if __name__ == "__main__":
    main()
