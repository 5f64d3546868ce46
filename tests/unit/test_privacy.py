"""Differential privacy: what is clipped, how much noise there is, and what the ledger says it costs."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from flwr.serverapp.strategy import DifferentialPrivacyServerSideFixedClipping
from flwr.serverapp.strategy import FedAvg as FlowersFedAvg

from fedtide.aggregation.rounds import strategy_state
from fedtide.aggregation.rounds.privacy_ledger import epsilon, ledger
from fedtide.aggregation.strategies import FedAvg, PrivateFedAvg
from fedtide.fabric.flower import bridge as flower
from fedtide.fabric.plans.release import Privacy, PrivacySpent
from tests.unit.test_strategies import Case, _messages, _minimal

SIZE = 20_000


@pytest.fixture(autouse=True)
def _a_process_of_flower() -> None:
    flower.adopt_identity(1, flower.SUPERLINK_NODE_ID)


def _case(norms: list[float]) -> Case:
    case = Case(0)
    case.base = {"w": np.zeros(SIZE, "f4"), "n": np.asarray(7)}
    direction = np.full(SIZE, SIZE**-0.5)
    case.updates = [{"w": (n * direction).astype("f4"), "n": np.asarray(100)} for n in norms]
    case.weights = list(range(1, len(norms) + 1))
    return case


def _strategy(count: int, **options: float) -> PrivateFedAvg:
    return PrivateFedAvg(**{"noise_multiplier": 1.0, "clip": 2.0, **options}, **_minimal(count))


def _round(strategy: PrivateFedAvg, case: Case) -> np.ndarray:
    arrays, _ = strategy.aggregate_train(1, case.replies(_messages(strategy, case)))
    assert arrays is not None
    assert arrays["n"].numpy() == 7  # no noise would hide a counter
    return arrays["w"].numpy()


def test_updates_are_clipped_and_the_noise_is_as_large_as_it_says() -> None:
    case = _case([1.0, 100.0, 2.0, 50.0])
    values = _round(_strategy(4), case)
    mean = (1.0 + 2.0 + 2.0 + 2.0) / 4 * SIZE**-0.5
    assert values.mean() == pytest.approx(mean, abs=4 * 0.5 / SIZE**0.5)
    assert values.std() == pytest.approx(1.0 * 2.0 / 4, rel=0.05)


def test_a_round_that_is_done_again_draws_the_same_noise_and_the_next_another() -> None:
    case, strategy = _case([1.0, 1.0]), _strategy(2)
    successor = _strategy(2)
    strategy_state.restore(successor, strategy_state.capture(strategy))
    first = _round(strategy, case)
    np.testing.assert_array_equal(first, _round(successor, case))
    assert np.abs(first - _round(strategy, case)).max() > 0.1


def test_adaptive_clipping_moves_to_the_quantile(monkeypatch: pytest.MonkeyPatch) -> None:
    seeds = itertools.count()
    monkeypatch.setattr("secrets.randbits", lambda _: next(seeds))
    case = _case([1.0] * 5 + [9.0] * 5)
    strategy = _strategy(10, clip=0.1, target_quantile=0.8, count_noise=0.6, noise_multiplier=0.5)
    for _ in range(60):
        _round(strategy, case)
    assert 5.0 < strategy.clip < 14.0


def test_a_count_noise_that_eats_the_budget_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"above 0\.5"):
        _round(_strategy(4, target_quantile=0.5, count_noise=0.4), _case([1.0] * 4))


def test_epsilon_is_that_of_the_gaussian_mechanism() -> None:
    # One release at z = 1: the exact curve (Balle and Wang 2018, theorem 8) gives 4.377 at 1e-5; Renyi bounds it.
    once = epsilon([PrivacySpent(run="r", rounds=1, noise_multiplier=1.0, cohort=10)], 1e-5)
    assert 4.377 <= once < 4.9
    twice = epsilon([PrivacySpent(run=r, rounds=1, noise_multiplier=math.sqrt(2), cohort=10) for r in "ab"], 1e-5)
    assert twice == pytest.approx(once, rel=1e-6)


def test_cohorts_drawn_from_many_cost_less_than_all() -> None:
    everyone = PrivacySpent(run="r", rounds=100, noise_multiplier=4.0, cohort=1000, population=1000)
    few = PrivacySpent(run="r", rounds=100, noise_multiplier=4.0, cohort=20, population=1000)
    assert epsilon([few], 1e-5) < 0.3 * epsilon([everyone], 1e-5)


def test_the_ledger_grows_over_runs_and_ends_with_one_that_has_no_noise() -> None:
    strategy = _strategy(2)
    for _ in range(3):
        _round(strategy, _case([1.0, 1.0]))
    first = ledger(None, "run-1", strategy)
    assert first is not None
    assert [(e.rounds, e.cohort, e.noise_multiplier) for e in first.entries] == [(3, 2, 1.0)]
    second = ledger(first, "run-2", strategy)
    assert second is not None
    assert [e.run for e in second.entries] == ["run-1", "run-2"]
    assert second.epsilon > first.epsilon
    assert Privacy.model_validate_json(second.model_dump_json()) == second
    assert ledger(second, "run-3", FedAvg()) is None


def test_flowers_own_wrappers_promise_nothing_that_we_would_sign() -> None:
    wrapped = DifferentialPrivacyServerSideFixedClipping(FlowersFedAvg(), 1.5, 2.0, num_sampled_clients=8)
    assert ledger(None, "r", wrapped) is None


def test_the_same_noise_is_not_drawn_for_other_updates() -> None:
    case = _case([1.0, 1.0, 1.0])
    strategy, successor = _strategy(3), _strategy(3)
    strategy_state.restore(successor, strategy_state.capture(strategy))
    arrays, _ = successor.aggregate_train(1, case.replies(_messages(successor, case))[:2])
    two = arrays["w"].numpy()
    assert np.abs(np.diff(_round(strategy, case) * 3) - np.diff(two * 2)).max() > 0.1


@pytest.mark.parametrize(
    "options", [{"noise_multiplier": 0.0}, {"clip": -1.0}, {"delta": 1.0}, {"target_quantile": 1.5}], ids=str
)
def test_parameters_that_promise_nothing_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="expected"):
        _strategy(2, **options)
