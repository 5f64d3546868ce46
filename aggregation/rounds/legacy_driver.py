"""Apps of Flower's legacy API (`server_fn`, `Strategy.aggregate_fit`): their model and history.

Such a run reports its rounds after the fact, and exports its model like any other.
"""

from __future__ import annotations

from collections import defaultdict

from flwr.app import Array, ArrayRecord
from flwr.server import History

from fedtide.aggregation.config import WorkerConfig
from fedtide.aggregation.grid.round_reports import Accounts
from fedtide.fabric.flower import bridge as flower


class LegacyDriver:
    """`arrays` is the final model (records named "0", "1", ...) once a legacy run ended."""

    def __init__(self, config: WorkerConfig, accounts: Accounts) -> None:
        self._config = config
        self._accounts = accounts
        self.arrays: ArrayRecord | None = None
        self.metrics: dict[str, float] = {}

    def install(self) -> None:
        flower.watch_legacy_runs(self._config.spec.rounds, self._ended)

    def _ended(self, history: History, arrays: list[Array]) -> None:
        self.arrays = ArrayRecord({str(i): array for i, array in enumerate(arrays)})
        for number, metrics in sorted(by_round(history).items()):
            self.metrics = metrics
            self._accounts.closed(number, metrics, self._accounts.seconds(number))


def by_round(history: History) -> dict[int, dict[str, float]]:
    """A legacy history turned around: metrics by round, named as the round driver names them."""
    rounds: dict[int, dict[str, float]] = defaultdict(dict)
    for name, series in (("eval_loss", history.losses_distributed), ("loss", history.losses_centralized)):
        for number, value in series:
            rounds[number][name] = float(value)
    for prefix, table in (
        ("train_", history.metrics_distributed_fit),
        ("eval_", history.metrics_distributed),
        ("", history.metrics_centralized),
    ):
        for key, entries in table.items():
            for number, scalar in entries:
                if isinstance(scalar, int | float):
                    rounds[number][f"{prefix}{key}"] = float(scalar)
    return rounds
