"""Peak memory of one round's mean over N updates, above a process that holds the model: ours, and Flower's.

Each case is a process of its own. Updates arrive as frames in chunks of 1 MiB, made one after the other, so
what a case needs for itself is what it keeps. Flower's needs all of them at once: beyond what this
machine holds it is left out.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile

import numpy as np

from benchmarks.report import Row, load_now, write

TENSORS, ELEMENTS = 8, 1_000_000
MODEL_BYTES = TENSORS * ELEMENTS * 4
COUNTS = (10, 100, 1000)
FLOWERS_LIMIT = 100


def _model(seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed % 8)
    return {f"t{k}": rng.standard_normal(ELEMENTS, dtype=np.float32) for k in range(TENSORS)}


def _peak_bytes() -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))


def _reset_peak() -> None:
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")


def _ours(count: int) -> None:
    from fedtide.aggregation.sums.agreement import Agreement
    from fedtide.aggregation.sums.round_sum import RoundSum, Weight
    from fedtide.fabric.tensors.frame import Tensor, encode

    base = [Tensor.of(k, v) for k, v in _model(0).items()]
    frames = [b"".join(encode([Tensor.of(k, v) for k, v in _model(s).items()])) for s in (1, 2)]
    _reset_peak()
    before = _peak_bytes()
    total = RoundSum(Agreement.of(base, 2048))
    for number in range(count):
        frame = memoryview(frames[number % 2])
        incoming = total.expect(str(number), Weight(3.0, 3.0), len(frame))
        for low in range(0, len(frame), 1 << 20):
            assert incoming.feed(bytes(frame[low : low + (1 << 20)])) is None
        incoming.accept()
    assert len(list(total.total.mean())) == TENSORS
    print(json.dumps(_peak_bytes() - before))


def _share(count: int) -> None:
    """One of `count` shards of a model of 1 GB, which lies in a file: what a fold worker keeps of two updates."""
    from fedtide.aggregation.sums.agreement import Agreement
    from fedtide.aggregation.sums.fixed_point import FixedPoint
    from fedtide.aggregation.sums.round_sum import RoundSum, Weight
    from fedtide.fabric.tensors.frame import Tensor, encode

    elements, chunk = 250_000_000 // TENSORS, 1 << 20
    one = np.random.default_rng(0).standard_normal(elements, dtype=np.float32)
    with tempfile.TemporaryFile() as file:
        parts = encode([Tensor.of(f"t{k}", one) for k in range(TENSORS)])
        file.writelines(parts)
        size = file.tell()
        specs = tuple(Tensor.of(f"t{k}", one).spec for k in range(TENSORS))
        del one, parts
        _reset_peak()
        before = _peak_bytes()
        total = RoundSum(Agreement(specs, (FixedPoint.agree(4.0, 2),) * TENSORS, 2), shard=(0, count))
        for number in range(2):
            incoming = total.expect(str(number), Weight(1.0, 1.0), size)
            assert incoming.feed(os.pread(file.fileno(), chunk, 0)) is None
            for k in incoming.wanted_chunks(chunk)[1:]:
                incoming.skip_to(k * chunk)
                assert incoming.feed(os.pread(file.fileno(), chunk, k * chunk)) is None
            incoming.skip_to(size)
            incoming.accept()
        for _ in total.total.mean_blocks():
            pass
    print(json.dumps((_peak_bytes() - before) / size * MODEL_BYTES))


def _flowers(count: int) -> None:
    from flwr.app import Array, ArrayRecord, MetricRecord, RecordDict
    from flwr.serverapp.strategy.strategy_utils import aggregate_arrayrecords

    def record(seed: int) -> ArrayRecord:
        return ArrayRecord({k: Array(v) for k, v in _model(seed).items()})

    base = record(0)
    _reset_peak()
    before = _peak_bytes()
    records = [RecordDict({"a": record(s), "m": MetricRecord({"n": 3})}) for s in range(count)]
    assert len(aggregate_arrayrecords(records, "n")) == len(base)
    print(json.dumps(_peak_bytes() - before))


def _measure(who: str, count: int) -> float:
    command = [sys.executable, "-m", "benchmarks.bench_memory", who, str(count)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return float(json.loads(done.stdout)) / MODEL_BYTES


def main() -> None:
    if len(sys.argv) > 1:
        {"ours": _ours, "flowers": _flowers, "share": _share}[sys.argv[1]](int(sys.argv[2]))
        return
    load = load_now()
    rows = []
    for count in COUNTS:
        theirs = _measure("flowers", count) if count <= FLOWERS_LIMIT else None
        rows.append(Row(f"N = {count}", "peak above base", "models", _measure("ours", count), theirs, "Flower's mean"))
    whole = _measure("share", 1)
    for count in (2, 4):
        share = _measure("share", count)
        rows.append(Row(f"1 GB, {count} shards", "peak above base", "models", share, whole, "one process"))
    write("memory", load, rows)


if __name__ == "__main__":
    main()
