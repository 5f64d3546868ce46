"""The lines that Flower's own loop writes into its log (flwr 1.42, `Strategy.start`): people look for them."""

from __future__ import annotations

import logging

from flwr.app import MetricRecord
from flwr.serverapp.strategy import Result

from fedtide.aggregation.rounds.progress import Progress

_log = logging.getLogger("flwr")
MOST_ROUNDS_SHOWN = 100
"""The results of longer runs are not repeated at their end."""


def begins(progress: Progress) -> None:
    """A strategy starts."""
    _log.info("Starting %s strategy:", type(progress.strategy).__name__)
    _log.info("\t├── Number of rounds: %d", progress.last_round)
    _log.info("\t├── ArrayRecord (%.2f MB)", sum(len(a.data) for a in progress.arrays.values()) / 1024**2)
    for phase in ("train", "evaluate"):
        given = dict(progress.configs[phase])
        _log.info("\t├── ConfigRecord (%s): %s", phase, given or "(empty!)")
    progress.strategy.summary()
    _log.info("")


def round_begins(progress: Progress) -> None:
    """A round, in whichever trial."""
    again = f" (trial {progress.trial})" if progress.trial > 1 else ""
    _log.info("")
    _log.info("[ROUND %s/%s]%s", progress.round, progress.last_round, again)


def aggregated(metrics: MetricRecord) -> None:
    """A phase on the nodes is over."""
    _log.info("\t└──> Aggregated MetricRecord: %s", metrics)


def evaluated_here(number: int, metrics: MetricRecord | None) -> None:
    """The app's own evaluation is over."""
    if number:
        _log.info("Global evaluation")
        _log.info("\t└──> MetricRecord: %s", metrics)
    else:
        _log.info("Initial global evaluation results: %s", metrics)


def ends(result: Result, rounds: int, seconds: float) -> None:
    """The strategy is through."""
    _log.info("")
    _log.info("Strategy execution finished in %.2fs", seconds)
    if rounds <= MOST_ROUNDS_SHOWN:
        _log.info("")
        _log.info("Final results:")
        _log.info("")
        for line in str(result).splitlines():
            _log.info("\t%s", line)
    _log.info("")
