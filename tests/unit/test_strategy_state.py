"""A strategy's memory survives as data, whatever its kind; another strategy's is refused."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord
from flwr.serverapp.strategy import DifferentialPrivacyServerSideAdaptiveClipping, FedAdam, FedAvg, FedAvgM, Strategy

from fedtide.aggregation.rounds import random_state, strategy_state
from fedtide.aggregation.rounds.strategy_state import StrategyState
from fedtide.fabric.errors import MalformedMessage
from fedtide.fabric.tensors.frame import decode, encode


def _through_bytes(strategy: Strategy) -> StrategyState:
    state = strategy_state.capture(strategy)
    frame = b"".join(encode(state.tensors))
    return StrategyState(json.loads(json.dumps(state.tree)), decode(frame))


def test_the_moments_of_fedadam_come_back_bit_for_bit() -> None:
    old, new = FedAdam(), FedAdam()
    old.m_t = {"w": np.array([0.1, 0.2], np.float32)}
    old.v_t = {"w": np.array([1e-9, 3.0], np.float32)}
    old.current_arrays = {"w": np.zeros(2, np.float32)}
    strategy_state.restore(new, _through_bytes(old))
    for name in ("m_t", "v_t", "current_arrays"):
        assert getattr(new, name)["w"].tobytes() == getattr(old, name)["w"].tobytes()
        assert getattr(new, name)["w"].dtype == np.float32


def test_momentum_that_holds_records_and_lists_comes_back() -> None:
    old, new = FedAvgM(server_momentum=0.9), FedAvgM(server_momentum=0.5)
    old.current_arrays = ArrayRecord({"w": Array(np.ones(3, np.float32))})
    old.momentum_vector = [np.arange(3.0)]
    strategy_state.restore(new, _through_bytes(old))
    assert new.server_momentum == 0.9
    assert new.current_arrays["w"].data == old.current_arrays["w"].data
    assert np.array_equal(new.momentum_vector[0], np.arange(3.0))


def test_a_wrapped_strategy_is_kept_with_its_wrapper() -> None:
    def make() -> DifferentialPrivacyServerSideAdaptiveClipping:
        return DifferentialPrivacyServerSideAdaptiveClipping(FedAdam(), noise_multiplier=0.1, num_sampled_clients=100)

    old, new = make(), make()
    old.clipping_norm = 0.123
    vars(old.strategy)["m_t"] = {"w": np.ones(2)}
    strategy_state.restore(new, _through_bytes(old))
    assert new.clipping_norm == 0.123
    assert np.array_equal(vars(new.strategy)["m_t"]["w"], np.ones(2))


def test_functions_stay_the_apps_own() -> None:
    strategy = FedAvg()
    aggregate = strategy.train_metrics_aggr_fn
    strategy_state.restore(strategy, _through_bytes(FedAvg()))
    assert strategy.train_metrics_aggr_fn is aggregate


def test_the_state_of_another_strategy_is_refused() -> None:
    with pytest.raises(MalformedMessage, match="FedAvg"):
        strategy_state.restore(FedAdam(), _through_bytes(FedAvg()))


def test_random_generators_continue_where_they_were() -> None:
    state = random_state.capture()
    first = (random.random(), np.random.rand())
    random_state.restore(state)
    assert (random.random(), np.random.rand()) == first
