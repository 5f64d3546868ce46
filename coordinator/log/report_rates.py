"""How much a sender may report: a node that sends without end fills no log. Pure but for the time it is told."""

from __future__ import annotations

from dataclasses import dataclass

from fedtide.fabric.nats.subjects import HUB_REGION, Report


@dataclass(frozen=True, slots=True)
class Rate:
    """So many reports of `UNIT_BYTES` at once, and so many a second after that; a larger one counts more."""

    burst: float
    per_s: float


UNIT_BYTES = 4096
OF_NODES = Rate(2_000, 5.0)
"""A node that was away for a month reports all that it has done meanwhile at once."""
OF_RUNS = Rate(200_000, 2_000.0)
"""An aggregator reports each update of a round."""


class ReportRates:
    """A bucket for each sender (https://en.wikipedia.org/wiki/Token_bucket); those that are full are forgotten."""

    def __init__(self) -> None:
        self._left: dict[tuple[str, str], tuple[float, float]] = {}
        self._forget_at = 1_000

    def why_too_many(self, sender: Report, size_bytes: int, now: float) -> str | None:
        """Count a report; why it is one too many, if it is.

        Args:
            now: seconds of a clock that never goes back.
        """
        rate, key = OF_RUNS if sender.region == HUB_REGION else OF_NODES, (sender.region, sender.node)
        left, at = self._left.get(key, (rate.burst, now))
        left = min(rate.burst, left + (now - at) * rate.per_s)
        cost = max(1.0, size_bytes / UNIT_BYTES)
        enough = left >= cost
        self._left[key] = (left - cost if enough else left, now)
        if len(self._left) > self._forget_at:
            self._forget(now)
        return None if enough else f"{sender.node} reports more than {rate.per_s * UNIT_BYTES / 1e3:.0f} kB a second"

    def _forget(self, now: float) -> None:
        def is_full(key: tuple[str, str], left: float, at: float) -> bool:
            rate = OF_RUNS if key[0] == HUB_REGION else OF_NODES
            return left + (now - at) * rate.per_s >= rate.burst

        self._left = {key: (left, at) for key, (left, at) in self._left.items() if not is_full(key, left, at)}
        self._forget_at = 2 * len(self._left) + 1_000
