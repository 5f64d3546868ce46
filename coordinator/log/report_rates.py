"""How many reports a sender may send: a node that sends without end fills no log. Pure but for the time it is told."""

from __future__ import annotations

from dataclasses import dataclass

from fedtide.fabric.nats.subjects import HUB_REGION, Report


@dataclass(frozen=True, slots=True)
class Rate:
    """So many at once, and so many a second after that."""

    burst: float
    per_s: float


OF_NODES = Rate(2_000, 5.0)
"""A node that was away for a month reports all that it has done meanwhile at once."""
OF_RUNS = Rate(200_000, 2_000.0)
"""An aggregator reports each update of a round."""


class ReportRates:
    """A bucket for each sender (https://en.wikipedia.org/wiki/Token_bucket); those that are full are forgotten."""

    def __init__(self) -> None:
        self._left: dict[tuple[str, str], tuple[float, float]] = {}
        self._forget_at = 1_000

    def why_too_many(self, sender: Report, now: float) -> str | None:
        """Count a report; why it is one too many, if it is.

        Args:
            now: seconds of a clock that never goes back.
        """
        rate, key = OF_RUNS if sender.region == HUB_REGION else OF_NODES, (sender.region, sender.node)
        left, at = self._left.get(key, (rate.burst, now))
        left = min(rate.burst, left + (now - at) * rate.per_s)
        self._left[key] = (max(0.0, left - 1), now)
        if len(self._left) > self._forget_at:
            self._forget(now)
        return None if left >= 1 else f"{sender.node} sends more than {rate.per_s:g} reports a second"

    def _forget(self, now: float) -> None:
        def is_full(key: tuple[str, str], left: float, at: float) -> bool:
            rate = OF_RUNS if key[0] == HUB_REGION else OF_NODES
            return left + (now - at) * rate.per_s >= rate.burst

        self._left = {key: (left, at) for key, (left, at) in self._left.items() if not is_full(key, left, at)}
        self._forget_at = 2 * len(self._left) + 1_000
