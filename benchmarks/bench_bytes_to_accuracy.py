"""Bytes both ways until the digits are learned to a set accuracy, for every codec; and accuracy after all rounds.

10 nodes on Dirichlet(0.5), all of which take part; models go down coded against the first one, as the aggregator
sends them, updates come up coded by the mod, as nodes do. The peer is the same run without codecs.
"""

from __future__ import annotations

import logging
import sys
from dataclasses import dataclass

from flwr.app import ArrayRecord

from benchmarks.report import Row, load_now, write
from benchmarks.simulation import NODES, Fleet
from fedtide.aggregation.strategies import FedAvg
from fedtide.edge_agent.training.compression import CompressionMod
from fedtide.fabric.flower import bridge as flower
from fedtide.fabric.flower.records import decoded
from fedtide.fabric.tensors import codecs
from fedtide.fabric.tensors.frame import Tensor, encode, frame_size

ROUNDS, SPLIT, SEED, EPOCHS = 15, "dirichlet 0.5", 1, 2
TARGET = 0.93
CASES = [
    ("", ""),
    ("bf16", "bf16"),
    ("int8", "int8+hadamard"),
    ("int4+hadamard", "int8+hadamard"),
    ("int4+hadamard", "int4+hadamard"),
    ("topk:0.05", "int8+hadamard"),
    ("topk:0.05", "int4+hadamard"),
    ("topk:0.02", "int4+hadamard"),
]


@dataclass
class Learned:
    bytes_to_target: int | None
    final: float


def _down(arrays: ArrayRecord, anchor: list[Tensor], codec: str, round_: int) -> tuple[ArrayRecord, int]:
    """What nodes get, and how many bytes it is to each; the anchor itself goes out once, in the first round."""
    tensors = flower.tensors_of(arrays)
    if not codec or round_ == 1:
        return arrays, frame_size(encode(tensors))
    base = {t.name: t for t in anchor}
    coded = codecs.encode(tensors, base, codecs.Codec.parse(codec), round_)
    return decoded(coded, base), frame_size(encode(coded))


def _learn(up: str, down: str) -> Learned:
    fleet = Fleet.of(SPLIT, SEED, epochs=EPOCHS, mod=(lambda: CompressionMod(up)) if up else None)
    strategy = FedAvg(min_train_nodes=NODES, min_available_nodes=NODES)
    arrays = fleet.start()
    anchor = flower.tensors_of(arrays)
    moved, reached, scores = 0, None, []
    for round_ in range(1, ROUNDS + 1):
        given, size = _down(arrays, anchor, down, round_)
        replies = fleet.replies(strategy, given, round_)
        moved += NODES * size
        moved += sum(frame_size(encode(flower.tensors_of(r.content["arrays"]))) for r in replies)
        # The server adds differences to its own exact model (docs/decisions/0012).
        sent = {t.name: t for t in flower.tensors_of(arrays)}
        for reply in replies:
            reply.content["arrays"] = decoded(flower.tensors_of(reply.content["arrays"]), sent)
        found, _ = strategy.aggregate_train(round_, replies)
        assert found is not None
        arrays = found
        scores.append(fleet.accuracy(arrays))
        if reached is None and scores[-1] >= TARGET:
            reached = moved
    return Learned(reached, sum(scores[-3:]) / 3)


def main() -> None:
    load = load_now()
    logging.disable(logging.WARNING)
    flower.adopt_identity(1, flower.SUPERLINK_NODE_ID)
    rows: list[Row] = []
    plain: Learned | None = None
    for up, down in CASES:
        learned = _learn(up, down)
        plain = plain or learned
        case = f"up {up or 'plain'}, down {down or 'plain'}"
        print(case, learned, file=sys.stderr)
        assert plain.bytes_to_target is not None
        if learned.bytes_to_target is not None:
            fewer = plain.bytes_to_target / learned.bytes_to_target
            mb = learned.bytes_to_target / 1e6
            rows.append(
                Row(case, f"to {TARGET:.0%}", "MB", mb, plain.bytes_to_target / 1e6, "plain", f"{fewer:.1f}x fewer")
            )
        points = 100 * (learned.final - plain.final)
        rows.append(Row(case, "last 3 rounds", "%", 100 * learned.final, 100 * plain.final, "plain", f"{points:+.2f}"))
    write("bytes_to_accuracy", load, rows)


if __name__ == "__main__":
    main()
