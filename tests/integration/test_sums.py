"""Our strategies over NATS: folded as updates arrive, the same as computed in one place, liars left out."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from fedtide.fabric.messages.views import RunView
from tests.conftest import APPS
from tests.integration.installation import Installation

NODES, ROUNDS, SIZE = 4, 2, 600_000
Model = dict[str, np.ndarray]


def _moved(model: Model, pid: int, round_: int) -> Model:
    spec = importlib.util.spec_from_file_location("sums_client", APPS / "sums" / "sums_client.py")
    assert spec is not None
    assert spec.loader is not None
    client = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(client)
    return client.moved(model, pid, round_)


def _by_hand(rule: Callable[[list[Model], list[int]], Model], nodes: list[int]) -> Model:
    model: Model = {"w": np.zeros(SIZE, "f4"), "b": np.zeros((), "f8"), "n": np.zeros((), "f8")}
    for round_ in range(1, ROUNDS + 1):
        model = rule([_moved(model, pid, round_) for pid in nodes], nodes)
    return model


def _mean(updates: list[Model], nodes: list[int]) -> Model:
    weights = np.array([pid + 1 for pid in nodes], "f8")
    return {
        k: np.asarray(sum(w * u[k].astype("f8") for w, u in zip(weights, updates, strict=True)) / weights.sum())
        for k in ("w", "b", "n")
    }


def _median(updates: list[Model], nodes: list[int]) -> Model:
    return {k: np.median(np.stack([u[k] for u in updates]).astype("f8"), axis=0) for k in ("w", "b", "n")}


def _middle(updates: list[Model], nodes: list[int]) -> Model:
    return {
        k: np.sort(np.stack([u[k] for u in updates]).astype("f8"), axis=0)[1:-1].mean(axis=0) for k in ("w", "b", "n")
    }


def _learn(there: Installation, strategy: str, options: dict[str, Any], **more: Any) -> tuple[RunView, Model]:
    config = {"strategy": strategy, "options": json.dumps(options), **more}
    view = there.train(APPS / "sums", *[a for k, v in config.items() for a in ("--set", f"{k}={v}")])
    assert view.state == "completed", view.reason
    with np.load(there.out(view.run) / "final.npz") as saved:
        return view, dict(saved)


def _refused(view: RunView) -> list[list[str]]:
    phases = [r.phases["train"] for r in view.rounds if "train" in r.phases]
    return [[refusal.category for refusal in phase.refused.values()] for phase in phases]


@pytest.mark.parametrize(
    ("strategy", "options", "rule"),
    [
        ("FedAvg", {}, _mean),
        ("NormBound", {"bound": 1e6}, _mean),
        ("CoordinateMedian", {}, _median),
        ("StreamingTrimmedMean", {"num_malicious_nodes": 1}, _middle),
    ],
)
def test_a_strategy_gives_what_its_rule_says(
    installation: Installation, strategy: str, options: dict[str, Any], rule: Any
) -> None:
    view, model = _learn(installation, strategy, options)
    expected = _by_hand(rule, list(range(NODES)))
    for name in ("w", "b", "n"):
        np.testing.assert_allclose(model[name], expected[name], rtol=1e-5, atol=2e-6)
    assert _refused(view) == [[], []]


@pytest.mark.parametrize(("lie", "category"), [("nan", "not_finite"), ("huge", "out_of_range")])
def test_an_update_that_turns_bad_at_its_end_leaves_no_trace(
    installation: Installation, lie: str, category: str
) -> None:
    view, model = _learn(installation, "FedAvg", {}, poisoned=2, lie=lie)
    expected = _by_hand(_mean, [0, 1, 3])
    np.testing.assert_allclose(model["w"], expected["w"], rtol=1e-5, atol=2e-6)
    assert _refused(view) == [[category], [category]]


@pytest.mark.parametrize(
    ("strategy", "options"),
    [("NormBound", {"bound": 900.0, "refuse": True}), ("FedAvg", {}), ("CoordinateMedian", {})],
)
def test_an_update_that_moves_too_far_is_refused_where_asked(
    installation: Installation, strategy: str, options: dict[str, Any]
) -> None:
    poisoned = ("--set", "poisoned=1", "--set", "lie=far", "--set", f"strategy={strategy}")
    more = ("--policy", "max_update_norm=900") if not options else ()
    view = installation.train(APPS / "sums", *poisoned, "--set", f"options={json.dumps(options)}", *more)
    with np.load(installation.out(view.run) / "final.npz") as saved:
        model = dict(saved)
    rule = _median if strategy == "CoordinateMedian" else _mean
    np.testing.assert_allclose(model["w"], _by_hand(rule, [0, 2, 3])["w"], rtol=1e-5, atol=2e-6)
    assert _refused(view) == [["too_far"], ["too_far"]]


def _bytes(view: RunView) -> tuple[int, int]:
    return sum(r.bytes_up for r in view.rounds), sum(r.bytes_down for r in view.rounds)


@pytest.mark.parametrize(
    ("codecs", "loss", "up", "down"),
    [("up=int8,down=int8+hadamard", 0.02, 3.8, 1.5), ("up=int4+hadamard,down=bf16", 0.25, 7.0, 1.3)],
)
def test_a_codec_by_configuration_saves_bytes_both_ways(
    installation: Installation, codecs: str, loss: float, up: float, down: float
) -> None:
    plain = NODES * ROUNDS * SIZE * 4
    config = ("--set", "strategy=FedAvg", "--set", "options={}", "--policy", codecs)
    view = installation.train(APPS / "sums", *config)
    assert view.state == "completed", view.reason
    assert _refused(view) == [[], []]
    sent, received = _bytes(view)
    assert plain / sent > up
    assert plain / received > down  # the first round's model is what later ones are coded against
    with np.load(installation.out(view.run) / "final.npz") as model:
        expected = _by_hand(_mean, list(range(NODES)))
        error = np.linalg.norm(model["w"] - expected["w"]) / np.linalg.norm(expected["w"])
        assert 0 < error < loss
        np.testing.assert_allclose(model["b"], expected["b"], rtol=1e-6)
