"""The mod around a ClientApp: coded answers, and an error feedback that loses nothing in the long run."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp.mod import LocalDpMod

from fedtide.aggregation.strategies import CoordinateMedian, FedAvg
from fedtide.edge_agent.training.compression import CompressionMod
from fedtide.fabric.flower import bridge as flower
from fedtide.fabric.tensors.codecs import is_coded
from tests.offline_grid import OfflineGrid

SIZE = 4000


@pytest.fixture(autouse=True)
def _a_process_of_flower() -> None:
    flower.adopt_identity(1, flower.SUPERLINK_NODE_ID)


def _record(values: np.ndarray) -> ArrayRecord:
    return ArrayRecord({"w": Array(values), "n": Array(np.asarray(3))})


def _app(message: Message, context: Context) -> Message:
    """Moves every weight by one seeded draw that is the same in each round."""
    draw = np.random.default_rng(5).standard_normal(SIZE).astype("f4")
    new = ArrayRecord({"w": Array(message.content["arrays"]["w"].numpy() + draw), "n": message.content["arrays"]["n"]})
    return Message(RecordDict({"arrays": new, "metrics": MetricRecord({"num-examples": 1})}), reply_to=message)


def _round(strategy: Any, mods: list[CompressionMod], contexts: list[Context], model: ArrayRecord, round_: int) -> Any:
    sent = list(strategy.configure_train(round_, model, ConfigRecord(), OfflineGrid(len(mods))))
    replies = []
    for message, mod, context in zip(sent, mods, contexts, strict=True):
        flower.stamp(message, f"{round_}-{message.metadata.dst_node_id}")
        replies.append(mod(message, context, _app))
    assert all(is_coded(flower.tensors_of(r.content["arrays"])) for r in replies)
    return strategy.aggregate_train(round_, replies)[0]


def _contexts(count: int) -> list[Context]:
    return [flower.context_of(1, n, {}, {}, RecordDict()) for n in range(count)]


@pytest.mark.parametrize("kind", [FedAvg, CoordinateMedian])
def test_a_strategy_reads_coded_answers_under_flowers_own_grid(kind: Any) -> None:
    strategy = kind(min_train_nodes=3, min_available_nodes=3)
    start = _record(np.zeros(SIZE, "f4"))
    mods = [CompressionMod(c) for c in ("int8", "bf16", "int4+hadamard")]
    model = _round(strategy, mods, _contexts(3), start, 1)
    draw = np.random.default_rng(5).standard_normal(SIZE)
    assert np.linalg.norm(model["w"].numpy() - draw) < 0.15 * np.linalg.norm(draw)


def test_what_topk_leaves_out_comes_with_later_updates() -> None:
    strategy = FedAvg(min_train_nodes=1, min_available_nodes=1)
    model, contexts = _record(np.zeros(SIZE, "f4")), _contexts(1)
    draw = np.random.default_rng(5).standard_normal(SIZE).astype("f4")
    errors = []
    for round_ in range(1, 41):
        model = _round(strategy, [CompressionMod("topk:0.1")], contexts, model, round_)
        errors.append(np.linalg.norm(model["w"].numpy() / round_ - draw) / np.linalg.norm(draw))
    assert errors[0] > 0.5
    assert errors[-1] < 0.2
    assert "n" not in contexts[0].state.array_records["fedtide.residual"]


def test_answers_of_several_records_and_errors_pass_unchanged() -> None:
    message = Message(RecordDict({"arrays": _record(np.zeros(SIZE, "f4"))}), 1, "train")
    flower.stamp(message, "m")
    several = RecordDict({"a": _record(np.ones(SIZE, "f4")), "b": _record(np.ones(SIZE, "f4"))})
    answer = CompressionMod("int8")(message, _contexts(1)[0], lambda m, c: Message(several, reply_to=m))
    assert answer.content == several


def test_flowers_local_privacy_and_our_compression_go_together() -> None:
    strategy = FedAvg(min_train_nodes=2, min_available_nodes=2)
    start = _record(np.zeros(SIZE, "f4"))
    sent = list(strategy.configure_train(1, start, ConfigRecord(), OfflineGrid(2)))
    local = LocalDpMod(clipping_norm=1.0, sensitivity=1.0, epsilon=100.0, delta=1e-5)
    replies = []
    for message, context in zip(sent, _contexts(2), strict=True):
        flower.stamp(message, f"1-{message.metadata.dst_node_id}")
        private = lambda m, c: local(m, c, _without_counter)  # noqa: E731
        replies.append(CompressionMod("int8")(message, context, private))
    model, _ = strategy.aggregate_train(1, replies)
    assert np.linalg.norm(model["w"].numpy()) == pytest.approx(1.0, abs=1.5)  # clipped from 63, and noise


def _without_counter(message: Message, context: Context) -> Message:
    reply = _app(message, context)
    reply.content["arrays"]["n"] = Array(np.asarray(3.0))
    return reply
