"""The loop of `Strategy.start` as it runs in our aggregator: Flower's behaviour, reported.

Same calls in the same order and the same Result as flwr's own loop; beside it each round is
reported, updates are admitted before they are averaged, a run may start from a release's
arrays, and a finished round's blobs are dropped from the broker.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg, FedXgbBagging, FedXgbCyclic, Result, Strategy

from aggregation.admission import Refusal, inspect
from aggregation.config import WorkerConfig
from aggregation.grid_link import GridLink
from aggregation.nats_grid import NatsGrid
from fabric import flower
from fabric.errors import ConfigError, FedtideError
from fabric.events import RoundClosed
from fabric.tensors import Tensor

log = logging.getLogger(__name__)

EvaluateFn = Callable[[int, ArrayRecord], MetricRecord | None]
_NOT_AVERAGING = (FedXgbBagging, FedXgbCyclic)


class NothingLearned(FedtideError):
    """Rounds were run, and none of them brought an update that counts."""


class RoundDriver:
    """Drives the rounds of one run; `arrays` is the global model after the last one."""

    def __init__(self, config: WorkerConfig, link: GridLink, base: ArrayRecord | None) -> None:
        self._config = config
        self._link = link
        self._base = base
        self.arrays: ArrayRecord | None = None
        self.metrics: dict[str, float] = {}
        self._rounds = 0
        self._rounds_with_updates = 0

    def check(self) -> None:
        """Raises NothingLearned if this driver drove rounds and no update was ever averaged."""
        if self._rounds and not self._rounds_with_updates:
            raise NothingLearned(
                f"no update was accepted in {self._rounds} rounds", "`fedtide run show` lists why each was refused"
            )

    def install(self) -> None:
        """Make every `strategy.start(...)` of this process ours."""
        driver = self

        def start(
            strategy: Strategy,
            grid: Grid,
            initial_arrays: ArrayRecord,
            num_rounds: int = 3,
            timeout: float = 3600,
            train_config: ConfigRecord | None = None,
            evaluate_config: ConfigRecord | None = None,
            evaluate_fn: EvaluateFn | None = None,
        ) -> Result:
            rounds = driver._config.spec.rounds or num_rounds
            train, evaluate = train_config or ConfigRecord(), evaluate_config or ConfigRecord()
            return driver._drive(strategy, grid, initial_arrays, rounds, timeout, train, evaluate, evaluate_fn)

        Strategy.start = start  # type: ignore[method-assign, assignment]

    def _drive(
        self,
        strategy: Strategy,
        grid: Grid,
        initial: ArrayRecord,
        rounds: int,
        timeout: float,
        train_config: ConfigRecord,
        evaluate_config: ConfigRecord,
        evaluate_fn: EvaluateFn | None,
    ) -> Result:
        strategy.summary()
        result = Result()
        arrays = self.arrays = self._starting_point(initial)
        if evaluate_fn and (metrics := evaluate_fn(0, arrays)) is not None:
            result.evaluate_metrics_serverapp[0] = metrics
            self._close_round(0, result, 0.0)
        for number in range(1, rounds + 1):
            log.info("round.opened", extra={"round": number, "of": rounds})
            began = time.monotonic()
            self._enter(grid, number, arrays if _averages(strategy) else None)
            replies = grid.send_and_receive(
                strategy.configure_train(number, arrays, train_config, grid), timeout=timeout
            )
            new_arrays, metrics = strategy.aggregate_train(number, replies)
            sent = grid.model_blob() if isinstance(grid, NatsGrid) else []
            self._rounds += 1
            if new_arrays is not None:
                self._rounds_with_updates += 1
                arrays = result.arrays = self.arrays = new_arrays
            if metrics is not None:
                result.train_metrics_clientapp[number] = metrics
            self._enter(grid, number, None)
            replies = grid.send_and_receive(
                strategy.configure_evaluate(number, arrays, evaluate_config, grid), timeout=timeout
            )
            if (metrics := strategy.aggregate_evaluate(number, replies)) is not None:
                result.evaluate_metrics_clientapp[number] = metrics
            if evaluate_fn and (metrics := evaluate_fn(number, arrays)) is not None:
                result.evaluate_metrics_serverapp[number] = metrics
            self._close_round(number, result, time.monotonic() - began)
            self._link.call(self._link.forget_updates())
            for blob in sent:
                self._link.call(self._link.forget_blob(blob))
        return result

    def _starting_point(self, initial: ArrayRecord) -> ArrayRecord:
        if self._base is None:
            return initial
        refusal = inspect(flower.tensors_of(initial), flower.tensors_of(self._base))
        if refusal is not None:
            raise ConfigError("--base", f"the release does not fit this app: {refusal.reason}")
        return self._base

    @staticmethod
    def _enter(grid: Grid, number: int, averaged: ArrayRecord | None) -> None:
        if isinstance(grid, NatsGrid):
            grid.current_round = number
            grid.admission = _admission(flower.tensors_of(averaged)) if averaged is not None else None

    def _close_round(self, number: int, result: Result, seconds: float) -> None:
        metrics: dict[str, float] = {}
        for prefix, history in (
            ("train_", result.train_metrics_clientapp),
            ("eval_", result.evaluate_metrics_clientapp),
            ("", result.evaluate_metrics_serverapp),
        ):
            metrics |= scalars(history.get(number), prefix)
        self.metrics = metrics
        run, attempt = self._config.run, self._config.attempt
        closed = RoundClosed(run=run, attempt=attempt, round=number, metrics=metrics, seconds=seconds)
        self._link.call(self._link.report(closed))


def scalars(record: MetricRecord | None, prefix: str) -> dict[str, float]:
    """The numbers of a metric record, with prefixed names (lists are left out)."""
    if record is None:
        return {}
    return {f"{prefix}{k}": float(v) for k, v in record.items() if isinstance(v, int | float)}


def _averages(strategy: Strategy) -> bool:
    inner: Any = getattr(strategy, "strategy", strategy)  # the DP wrappers hold the strategy they wrap
    return isinstance(inner, FedAvg) and not isinstance(inner, _NOT_AVERAGING)


def _admission(sent: list[Tensor]) -> Callable[[Message], Refusal | None]:
    def admit(message: Message) -> Refusal | None:
        records = list(message.content.array_records.values())
        if len(records) != 1:
            return Refusal("wrong_shape", f"the reply holds {len(records)} array records, expected one")
        return inspect(sent, flower.tensors_of(records[0]))

    return admit
