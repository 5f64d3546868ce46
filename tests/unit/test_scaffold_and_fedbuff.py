"""Two strategies that remember: control variates on both sides, and updates from older models."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict

from fedtide.aggregation.strategies import FedAvg, FedBuff, Scaffold
from fedtide.edge_agent.training.scaffold import ScaffoldMod
from fedtide.fabric.flower import bridge as flower
from tests.offline_grid import OfflineGrid

RATE, STEPS, ROUNDS = 0.1, 10, 60
# f_i(x) = a_i (x - b_i)^2 / 2: FedAvg's local steps pull towards b_i, and its fixed point is not the optimum.
CURVES, CENTRES = [1.0, 9.0], [1.0, -1.0]
OPTIMUM = sum(a * b for a, b in zip(CURVES, CENTRES, strict=True)) / sum(CURVES)


@pytest.fixture(autouse=True)
def _a_process_of_flower() -> None:
    flower.adopt_identity(1, flower.SUPERLINK_NODE_ID)


def _app(node: int) -> Any:
    def app(message: Message, context: Context) -> Message:
        x = message.content["arrays"]["x"].numpy()
        correction = message.content.get("scaffold-correction")
        push = correction["x"].numpy() if correction is not None else 0.0
        for _ in range(STEPS):
            x = x - RATE * (CURVES[node] * (x - CENTRES[node]) + push)
        content = {
            "arrays": ArrayRecord({"x": Array(np.asarray(x))}),
            "metrics": MetricRecord({"num-examples": 1, "num-steps": STEPS}),
        }
        return Message(RecordDict(content), reply_to=message)

    return app


def _learn(strategy: Any, mods: list[Any]) -> float:
    model = ArrayRecord({"x": Array(np.zeros(1))})
    contexts = [flower.context_of(1, n, {}, {}, RecordDict()) for n in range(2)]
    for round_ in range(1, ROUNDS + 1):
        messages = list(strategy.configure_train(round_, model, ConfigRecord(), OfflineGrid(2)))
        replies = []
        for message in messages:
            node = message.metadata.dst_node_id - 1
            flower.stamp(message, f"{round_}-{node}")
            replies.append(
                mods[node](message, contexts[node], _app(node)) if mods else _app(node)(message, contexts[node])
            )
        model, _ = strategy.aggregate_train(round_, replies)
    return float(model["x"].numpy()[0])


def test_scaffold_reaches_the_optimum_that_fedavg_misses() -> None:
    assert abs(_learn(FedAvg(), []) - OPTIMUM) > 0.3
    assert _learn(Scaffold(), [ScaffoldMod(RATE), ScaffoldMod(RATE)]) == pytest.approx(OPTIMUM, abs=1e-3)


def test_an_app_without_the_mod_is_told_what_it_needs(caplog: pytest.LogCaptureFixture) -> None:
    strategy = Scaffold(min_train_nodes=1, min_available_nodes=1)
    model = ArrayRecord({"x": Array(np.zeros(1))})
    (message,) = strategy.configure_train(1, model, ConfigRecord(), OfflineGrid(1))
    flower.stamp(message, "m")
    reply = _app(0)(message, flower.context_of(1, 0, {}, {}, RecordDict()))
    assert strategy.aggregate_train(1, [reply]) == (None, None)
    assert "needs ScaffoldMod" in caplog.text


class SlowAndFast(OfflineGrid):
    """Node 1 answers at the next look, node 2 at every fifth."""

    def __init__(self) -> None:
        super().__init__(2)
        self.looks = 0
        self.waiting: dict[str, tuple[int, Message]] = {}
        self.pushed = 0

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        keys = []
        for message in messages:
            self.pushed += 1
            key = str(self.pushed)
            node = message.metadata.dst_node_id
            reply = _app(0)(flower.stamp(message, key), flower.context_of(1, node, {}, {}, RecordDict()))
            self.waiting[key] = (self.looks + (1 if node == 1 else 5), reply)
            keys.append(key)
        return keys

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        self.looks += 1
        due = [k for k in message_ids if k in self.waiting and self.waiting[k][0] <= self.looks]
        return [self.waiting.pop(k)[1] for k in due]


def test_fedbuff_closes_rounds_without_the_slow_and_counts_them_later(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.sleep", lambda _: None)
    grid = SlowAndFast()
    result = FedBuff(buffer=2).start(grid, ArrayRecord({"x": Array(np.zeros(1))}), num_rounds=40)
    assert result.arrays["x"].numpy()[0] == pytest.approx(CENTRES[0], abs=1e-3)
    assert len(result.train_metrics_clientapp) == 40
    assert grid.looks < 2 * 40


def test_an_update_older_than_allowed_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.sleep", lambda _: None)
    strategy = FedBuff(buffer=1, max_staleness=0, min_train_nodes=2)
    seen: list[int] = []
    original = FedBuff.aggregate_train

    def count(self: Any, round_: int, replies: Iterable[Message]) -> Any:
        replies = list(replies)
        seen.extend(m.metadata.src_node_id for m in replies)
        return original(self, round_, replies)

    monkeypatch.setattr(FedBuff, "aggregate_train", count)
    strategy.start(SlowAndFast(), ArrayRecord({"x": Array(np.zeros(1))}), num_rounds=10)
    assert set(seen) == {1}
