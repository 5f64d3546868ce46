"""The state of a running `strategy.start`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from flwr.app import ArrayRecord, ConfigRecord, MetricRecord
from flwr.serverapp.strategy import Result, Strategy

from fedtide.aggregation.grid.nats_grid import NatsGrid

EvaluateFn = Callable[[int, ArrayRecord], MetricRecord | None]


@dataclass
class Progress:
    """`round`: the round in progress or, between rounds, the last one. `bases`: the models that outstanding tasks
    train from, by round. `anchor`: the model that coded models are differences to, if any."""

    strategy: Strategy
    grid: NatsGrid
    arrays: ArrayRecord
    timeout: float
    configs: dict[str, ConfigRecord]
    evaluate_fn: EvaluateFn | None
    last_round: int
    result: Result = field(default_factory=Result)
    round: int = 0
    trial: int = 1
    rounds_with_updates: int = 0
    bytes_before: int = 0
    bases: dict[int, ArrayRecord] = field(default_factory=dict)
    anchor: ArrayRecord | None = None

    def metrics(self, number: int) -> dict[str, float]:
        """The numbers of one round, named by their origin (lists are left out)."""
        metrics: dict[str, float] = {}
        for prefix, history in (
            ("train_", self.result.train_metrics_clientapp),
            ("eval_", self.result.evaluate_metrics_clientapp),
            ("", self.result.evaluate_metrics_serverapp),
        ):
            record = history.get(number, MetricRecord())
            metrics |= {f"{prefix}{k}": float(v) for k, v in record.items() if isinstance(v, int | float)}
        return metrics

    def history(self) -> list[tuple[int, dict[str, float]]]:
        """(round, metrics) of every round so far."""
        return [(number, self.metrics(number)) for number in range(self.round + 1)]
