"""Our strategies against Flower's own, on random rounds: the same results within the bound of their dtypes."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from flwr.serverapp import strategy as flowers

from fedtide.aggregation import strategies as ours
from fedtide.fabric.flower import bridge as flower
from tests.offline_grid import OfflineGrid

CASES = 1000
"""Random rounds a rule is compared on."""
Arrays = dict[str, np.ndarray]


def _record(arrays: Arrays) -> ArrayRecord:
    return ArrayRecord({k: Array(v) for k, v in arrays.items()})


class Case:
    """A random round: a model, and updates that may tie, weigh nothing, be empty, scalar or of odd dtypes."""

    def __init__(self, seed: int) -> None:
        rng = np.random.default_rng(seed)
        self.rng = rng
        shapes = [(), (0,), (1,), (3,), (4, 5), (2, 3, 2), (33,)]
        form = [
            (str(rng.choice(["f4", "f4", "f8", "f2", "i4", "i8"])), shapes[int(rng.integers(len(shapes)))])
            for _ in range(int(rng.integers(1, 5)))
        ]
        count = int(rng.choice([1, 2, 3, 4, 5, 8, 13]))
        ties = bool(rng.integers(2))
        self.base = {f"t{i}": self._array(d, s, ties) for i, (d, s) in enumerate(form)}
        self.updates = [{f"t{i}": self._array(d, s, ties) for i, (d, s) in enumerate(form)} for _ in range(count)]
        weights = [int(w) for w in rng.integers(0, 200, count)]
        self.weights = weights if any(weights) else [1] * count

    def _array(self, dtype: str, shape: tuple[int, ...], ties: bool) -> np.ndarray:
        values = self.rng.integers(-3, 4, shape) if ties else self.rng.standard_normal(shape) * 3
        return np.asarray(values).astype(dtype)

    def replies(self, messages: Iterable[Message], **metrics: float) -> list[Message]:
        answers = []
        for message, update, weight in zip(messages, self.updates, self.weights, strict=True):
            values = MetricRecord({"num-examples": weight, "loss": float(weight) / 7, **metrics})
            answer = Message(RecordDict({"arrays": _record(update), "metrics": values}), reply_to=message)
            answers.append(flower.stamp(answer, f"reply-{answer.metadata.src_node_id}"))
        return answers


@pytest.fixture(autouse=True)
def _a_process_of_flower() -> None:
    logging.getLogger("flwr").setLevel(logging.WARNING)  # thousands of lines that nobody reads
    flower.adopt_identity(1, flower.SUPERLINK_NODE_ID)


def _messages(strategy: Any, case: Case, round_: int = 1, base: ArrayRecord | None = None) -> list[Message]:
    grid = OfflineGrid(len(case.updates))
    sent = list(strategy.configure_train(round_, base or _record(case.base), ConfigRecord(), grid))
    sent.sort(key=lambda m: m.metadata.dst_node_id)
    for message in sent:
        flower.stamp(message, f"task-{message.metadata.dst_node_id}")
    return sent


def _replies(strategy: Any, case: Case, round_: int = 1, base: ArrayRecord | None = None) -> list[Message]:
    answers = []
    for message, node in zip(_messages(strategy, case, round_, base), range(1, 99), strict=False):
        message.metadata.__dict__["_dst_node_id"] = node
        answers.append(message)
    return case.replies(answers)


def _minimal(count: int) -> dict[str, int]:
    return {"min_train_nodes": count, "min_available_nodes": count, "min_evaluate_nodes": count}


def _close(found: ArrayRecord, expected: ArrayRecord, *, loose: float = 1.0) -> None:
    assert list(found) == list(expected)
    for name in expected:
        a, b = found[name].numpy(), expected[name].numpy()
        assert a.shape == b.shape
        coarse = 4e-3 if np.float16 in (a.dtype, b.dtype) else 2e-6
        np.testing.assert_allclose(a.astype(np.float64), b.astype(np.float64), rtol=coarse * loose, atol=coarse * loose)


PAIRS: list[tuple[str, Callable[..., Any], Callable[..., Any], float]] = [
    ("FedAvg", ours.FedAvg, flowers.FedAvg, 1.0),
    ("FedAvgM", ours.FedAvgM, flowers.FedAvgM, 1.0),
    ("CoordinateMedian", ours.CoordinateMedian, flowers.FedMedian, 1.0),
    ("TrimmedMean", ours.TrimmedMean, flowers.FedTrimmedAvg, 1.0),
]


@pytest.mark.parametrize(
    ("name", "mine", "theirs", "loose"),
    [
        pytest.param(*p, id=p[0], marks=[pytest.mark.slow] * (p[0] in ("FedAvgM", "TrimmedMean", "CoordinateMedian")))
        for p in PAIRS
    ],
)
def test_a_round_gives_what_flowers_strategy_gives(name: str, mine: Any, theirs: Any, loose: float) -> None:
    for seed in range(CASES):
        case = Case(seed)
        options = _minimal(len(case.updates))
        a, b = mine(**options), theirs(**options)
        found, metrics = a.aggregate_train(1, _replies(a, case))
        expected, theirs_metrics = b.aggregate_train(1, _replies(b, case))
        assert found is not None, seed
        _close(found, expected, loose=loose)
        assert metrics["loss"] == pytest.approx(theirs_metrics["loss"])


SERVERS = ["FedAdam", "FedYogi", "FedAdagrad", "FedAvgM"]


@pytest.mark.parametrize("name", SERVERS)
def test_server_optimisers_follow_flowers_over_rounds(name: str) -> None:
    momentum = {"server_momentum": 0.9, "server_learning_rate": 0.7}
    options: dict[str, Any] = momentum if name == "FedAvgM" else {"eta": 0.05, "tau": 0.002}
    for seed in range(40):
        case = Case(seed)
        case.base = {k: np.asarray(v, "f4") for k, v in case.base.items()}
        options |= _minimal(len(case.updates))
        a, b = getattr(ours, name)(**options), getattr(flowers, name)(**options)
        at, bt = _record(case.base), _record(case.base)
        for round_ in (1, 2, 3):
            case.updates = [
                {k: np.asarray(v + case.rng.standard_normal(v.shape), "f4") for k, v in case.base.items()}
            ] * len(case.updates)
            at, _ = a.aggregate_train(round_, _replies(a, case, round_, at))
            bt, _ = b.aggregate_train(round_, _replies(b, case, round_, bt))
            _close(at, bt, loose=20)


def test_fedprox_sends_its_term() -> None:
    case = Case(3)
    strategy = ours.FedProx(proximal_mu=0.3, **_minimal(len(case.updates)))
    assert all(m.content["config"]["proximal-mu"] == 0.3 for m in _messages(strategy, case))


@pytest.mark.slow
def test_krum_selects_as_flowers_does_where_no_scores_tie() -> None:
    compared = 0
    for seed in range(CASES):
        case = Case(seed)
        case.base = {k: np.asarray(v, "f8") for k, v in case.base.items()}
        case.updates = [{k: np.asarray(v, "f8") for k, v in u.items()} for u in case.updates]
        flat = np.array([np.concatenate([v.ravel() for v in u.values()]) for u in case.updates])
        count, f = len(flat), int(case.rng.integers(0, 3))
        squares = ((flat[:, None] - flat[None]) ** 2).sum(axis=2)
        near = max(1, count - f - 2)
        scores = [np.sort(np.delete(row, k))[:near].sum() for k, row in enumerate(squares)]
        if len(np.unique(np.round(scores, 6))) < count:
            continue  # among ties Flower takes whatever its sort puts first
        compared += 1
        options = _minimal(count) | {"num_malicious_nodes": f, "num_nodes_to_select": min(count, 2)}
        a, b = ours.MultiKrum(**options), flowers.MultiKrum(**options)
        found, metrics = a.aggregate_train(1, _replies(a, case))
        expected, theirs = b.aggregate_train(1, _replies(b, case))
        _close(found, expected)
        assert metrics["loss"] == pytest.approx(theirs["loss"])
    assert compared > CASES / 4


def _hand(base: list[float], updates: list[list[float]], weights: list[int]) -> Case:
    case = Case(0)
    case.base = {"w": np.array(base, "f4")}
    case.updates = [{"w": np.array(u, "f4")} for u in updates]
    case.weights = weights
    return case


def _learn(strategy: Any, case: Case, **metrics: Any) -> list[float]:
    messages = _messages(strategy, case)
    answers = case.replies(messages)
    for answer in answers:
        for key, values in metrics.items():
            answer.content["metrics"][key] = values[answer.metadata.src_node_id - 1]
    arrays, _ = strategy.aggregate_train(1, answers)
    return [round(float(v), 5) for v in arrays["w"].numpy()]


def test_fednova_normalises_by_steps() -> None:
    # d = (2, 8) in (1, 4) steps: 2 a step each; tau_eff = (1 + 4) / 2 = 2.5.
    case = _hand([1.0], [[3.0], [9.0]], [10, 10])
    assert _learn(ours.FedNova(steps_key="s"), case, s=[1, 4]) == [1.0 + 2.5 * 2.0]
    assert _learn(ours.FedNova(steps_key="s"), case, s=[3, 3]) == [6.0]


def test_a_bound_scales_back_what_moves_the_model_too_far() -> None:
    case = _hand([0.0, 0.0], [[3.0, 4.0], [0.6, 0.8]], [1, 3])
    assert _learn(ours.NormBound(bound=1.0), case) == [0.6, 0.8]
    assert _learn(ours.NormBound(bound=2.0), case) == [round((1.2 + 3 * 0.6) / 4, 5), round((1.6 + 3 * 0.8) / 4, 5)]
    assert _learn(ours.NormBound(bound=2.0, refuse=True), case) == [0.6, 0.8]


def test_centred_clipping_takes_one_step_from_the_model() -> None:
    case = _hand([1.0, 0.0], [[1.0, 10.0], [1.0, 1.0]], [1, 100])
    assert _learn(ours.CentredClipping(radius=2.0), case) == [1.0, 1.5]


def test_fltrust_counts_what_points_where_the_server_points() -> None:
    case = _hand([0.0, 0.0], [[10.0, 0.0], [-10.0, 0.0], [3.0, 3.0]], [1, 1, 1])
    strategy = ours.FLTrust(own_update=lambda _, __: _record({"w": np.array([2.0, 0.0], "f4")}), **_minimal(3))
    trust = [1.0, 0.0, 2**-0.5]
    moves = [np.array([2.0, 0.0]), np.zeros(2), np.array([2**0.5, 2**0.5])]
    expected = sum(t * m for t, m in zip(trust, moves, strict=True)) / sum(trust)
    assert _learn(strategy, case) == [round(float(v), 5) for v in expected]


def test_the_streaming_trimmed_mean_is_the_trimmed_mean() -> None:
    for seed in range(200):
        case = Case(seed)
        count = len(case.updates)
        f = max(1, count // 4)
        strategy = ours.StreamingTrimmedMean(num_malicious_nodes=f, **_minimal(count))
        found, _ = strategy.aggregate_train(1, _replies(strategy, case))
        if count <= 2 * f:
            assert found == _record(case.base)
            continue
        for name in case.base:
            column = np.sort(np.stack([u[name] for u in case.updates]).astype("f8"), axis=0)[f : count - f]
            np.testing.assert_allclose(found[name].numpy(), column.mean(axis=0), rtol=2e-3, atol=2e-3)


def test_the_median_of_means_withstands_a_bucket_of_liars() -> None:
    case = _hand([0.0], [[1.0], [1.0], [1.0], [1.0], [1e6], [1.0]], [1] * 6)
    assert _learn(ours.MedianOfMeans(buckets=3, **_minimal(6)), case) == [1.0]


EVERY = [
    ours.FedAvg, ours.FedNova, ours.CoordinateMedian, ours.TrimmedMean, ours.MultiKrum, ours.Krum, ours.MedianOfMeans,
    ours.StreamingTrimmedMean,
]  # fmt: skip


@pytest.mark.parametrize("kind", EVERY, ids=lambda k: k.__name__)
def test_the_order_of_replies_does_not_change_a_byte(kind: Any) -> None:
    for seed in range(30):
        case = Case(seed)
        found = []
        for _ in range(3):
            random.seed(seed)
            strategy = kind(**_minimal(len(case.updates)))
            messages = _messages(strategy, case)
            answers = case.replies(messages, **{"num-steps": 3})
            case.rng.shuffle(answers)
            arrays, metrics = strategy.aggregate_train(1, answers)
            found.append(([bytes(t.data) for t in flower.tensors_of(arrays)], dict(metrics)))
        assert found[0] == found[1] == found[2]


@pytest.mark.parametrize("kind", EVERY, ids=lambda k: k.__name__)
def test_updates_that_do_not_fit_are_refused_and_the_others_count(kind: Any, caplog: Any) -> None:
    case = _hand([0.0], [[1.0]] * 3 + [[np.nan], [1.0, 2.0], [5.0], [5.0], [5.0], [5.0]], [1] * 9)
    strategy = kind(**_minimal(9))
    answers = case.replies(_messages(strategy, case), **{"num-steps": 1})
    del answers[5].content["metrics"]
    answers[6].content["metrics"]["num-examples"] = float("nan")
    answers[7].content["more"] = _record({"w": np.zeros(1, "f4")})
    answers[8] = Message(Error(1, "no"), reply_to=_messages(strategy, case)[8])
    arrays, metrics = strategy.aggregate_train(1, answers)
    assert arrays["w"].numpy().tolist() == [1.0]
    assert metrics["loss"] == pytest.approx(1 / 7)
    words = ["NaN", "shape", "metric records", "num-examples", "array records"]
    assert [w for w in words if w not in caplog.text] == []


def test_no_update_at_all_leaves_the_model() -> None:
    case = _hand([0.0], [[1.0]], [1])
    strategy = ours.FedAvg(**_minimal(1))
    _messages(strategy, case)
    assert strategy.aggregate_train(1, []) == (None, None)
    case.weights = [0]
    assert strategy.aggregate_train(1, case.replies(_messages(strategy, case))) == (None, None)
