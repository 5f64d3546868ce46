"""The weighted mean of 32 updates of 10 million float32: ours, Flower's, numpy's, and only reading the bytes.

All see the same arrays in turn, in one process; the time of ours contains the check of every
value and the cast of the mean. The peak memory of each is another benchmark's (`memory`).
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import numba as nb
import numpy as np
from flwr.app import Array, ArrayRecord, MetricRecord, RecordDict
from flwr.serverapp.strategy.strategy_utils import aggregate_arrayrecords

from benchmarks.report import Row, load_now, write
from fedtide.aggregation.sums.agreement import Agreement
from fedtide.aggregation.sums.device import THREADS, choose, on_all_cores
from fedtide.aggregation.sums.weighted_sum import WeightedSum
from fedtide.fabric.flower import bridge as flower

UPDATES, ELEMENTS, REPEATS = 32, 10_000_000, 7


@nb.njit(nogil=True)  # type: ignore[untyped-decorator]
def _read(values: np.ndarray) -> int:
    total = np.int64(0)
    for value in values:
        total += value
    return total


def main() -> None:
    load = load_now()
    rng = np.random.default_rng(0)
    records = []
    for _ in range(UPDATES):
        arrays = ArrayRecord({"w": Array(rng.standard_normal(ELEMENTS, dtype=np.float32))})
        records.append(RecordDict({"arrays": arrays, "metrics": MetricRecord({"n": int(rng.integers(1, 1000))})}))
    updates = [flower.tensors_of(r.array_records["arrays"]) for r in records]
    weights = [float(r.metric_records["metrics"]["n"]) for r in records]  # type: ignore[arg-type]
    agreement = Agreement.of(updates[0], max_terms=UPDATES)

    def ours() -> np.ndarray:
        total = WeightedSum(agreement)
        total.fold_all(updates, weights)
        (mean,) = total.mean()
        return mean.numpy()

    def flowers() -> np.ndarray:
        return aggregate_arrayrecords(records, "n")["w"].numpy()

    def numpys() -> np.ndarray:
        total = np.zeros(ELEMENTS, np.float32)
        for update, weight in zip(updates, weights, strict=True):
            total += update[0].numpy() * np.float32(weight / sum(weights))
        return total

    def read() -> None:
        parts = [np.array_split(np.frombuffer(u[0].data, np.int64), THREADS) for u in updates]
        on_all_cores(lambda part: _read(part) and None, [p for k in range(THREADS) for p in (q[k] for q in parts)])

    np.testing.assert_allclose(ours(), flowers(), rtol=2e-4, atol=1e-6)
    cases: dict[str, Callable[[], object]] = {"ours": ours, "flower": flowers, "numpy": numpys, "read": read}
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for case in cases.values():
        case()
    for _ in range(REPEATS):
        for name, case in cases.items():
            began = time.perf_counter()
            case()
            seconds[name].append(time.perf_counter() - began)
    best = {name: statistics.median(times) for name, times in seconds.items()}
    size = UPDATES * ELEMENTS * 4 / 1e9
    note = f"{THREADS} threads, {choose().name}"
    peers = {"flower": "aggregate_arrayrecords", "numpy": "in place, one thread", "read": "read-only pass"}
    rows = [
        Row(f"{UPDATES} x {ELEMENTS}", "bandwidth", "GB/s", size / best["ours"], size / best[peer], text, note)
        for peer, text in peers.items()
    ]
    write("sum", load, rows)


if __name__ == "__main__":
    main()
