"""When nodes are likely to be there and idle: by hour of the week, of each region, from what was seen before. Pure.

A seasonal average with exponential weights (Holt-Winters without trend, https://otexts.com/fpp3/holt-winters.html):
what a fleet did at this hour a week ago counts about half, what it did the week before a quarter.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime, timedelta

from immutables import Map

HOURS = 7 * 24
WEIGHT = 0.15
"""Of one sample; there are four in an hour."""

Shares = Map[int, float]
"""By hour of the week, from Monday midnight UTC: the share of a region's nodes that were free."""


def hour_of(at: datetime) -> int:
    utc = at.astimezone(UTC)
    return utc.weekday() * 24 + utc.hour


def after_sample(known: Shares, at: datetime, share: float) -> Shares:
    hour = hour_of(at)
    before = known.get(hour)
    return known.set(hour, share if before is None else (1 - WEIGHT) * before + WEIGHT * share)


def expected(known: Shares, at: datetime) -> float | None:
    """The share at a time; of an hour that was never seen, what other days had at that time; None: nothing is known."""
    hour = hour_of(at)
    if hour in known:
        return known[hour]
    others = [known[h] for h in range(hour % 24, HOURS, 24) if h in known]
    return sum(others) / len(others) if others else None


def best_time(
    begin: datetime, end: datetime, regions: Mapping[str, Shares], nodes: Mapping[str, int]
) -> tuple[datetime, float | None]:
    """When in a window most nodes are likely to be free, and what share of them; the earliest of equals.

    Args:
        begin, end: the window; `end` is no longer in it.
        nodes: how many of the cohort are in each region.
    """
    total = sum(nodes.values())

    def share(at: datetime) -> float:
        told = [(expected(regions.get(region, Map()), at), count) for region, count in nodes.items()]
        return sum((known or 0.0) * count for known, count in told) / total if total else 0.0

    best, most, at = begin, share(begin), begin
    while (at := (at + timedelta(hours=1)).replace(minute=0, second=0, microsecond=0)) < end:
        if (here := share(at)) > most + 1e-9:
            best, most = at, here
    is_known = any(regions.get(region) for region in nodes)
    return best, most if is_known else None
