"""The state of a running `strategy.start`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from flwr.app import ArrayRecord, ConfigRecord, MetricRecord
from flwr.serverapp.strategy import Result, Strategy

from fedtide.aggregation.grid.nats_grid import NatsGrid

EvaluateFn = Callable[[int, ArrayRecord], MetricRecord | None]
HISTORIES = ("train_metrics_clientapp", "evaluate_metrics_clientapp", "evaluate_metrics_serverapp")
_ORIGINS = dict(zip(HISTORIES, ("train_", "eval_", ""), strict=True))


@dataclass
class Best:
    """The best round by the run's stop rule, and its model."""

    round: int
    arrays: ArrayRecord


@dataclass
class Progress:
    """`round`: the round in progress or, between rounds, the last one. `bases`: the models that outstanding tasks
    train from, by round of the run. `anchor`: the model that coded models are differences to, if any.

    An app may start several strategies, one after the other: `stage` counts them from 1, `before` is the number of
    rounds of those before.
    """

    strategy: Strategy
    grid: NatsGrid
    arrays: ArrayRecord
    timeout: float
    configs: dict[str, ConfigRecord]
    evaluate_fn: EvaluateFn | None
    last_round: int
    stage: int = 1
    before: int = 0
    result: Result = field(default_factory=Result)
    round: int = 0
    trial: int = 1
    rounds_with_updates: int = 0
    asked_to_train: bool = False
    bytes_before: int = 0
    bases: dict[int, ArrayRecord] = field(default_factory=dict)
    anchor: ArrayRecord | None = None
    best: Best | None = None
    series: list[tuple[int, dict[str, float]]] = field(default_factory=list)
    """(round, its numbers) of every round so far."""

    @property
    def place(self) -> int:
        """The round's number in the run."""
        return self.before + self.round

    def metrics(self, number: int) -> dict[str, float]:
        """The numbers of one round, named by their origin (lists are left out)."""
        metrics: dict[str, float] = {}
        for name, prefix in _ORIGINS.items():
            record = getattr(self.result, name).get(number, MetricRecord())
            metrics |= {f"{prefix}{k}": float(v) for k, v in record.items() if isinstance(v, int | float)}
        return metrics
