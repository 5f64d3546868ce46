"""Hours that cost much more than such hours usually do. Pure.

What is usual is the median of the same hour of the day over the days before, and what is much is told by the median
absolute deviation (Hampel's identifier; Leys et al. 2013): both bear a few bad days in the history.
"""

from __future__ import annotations

from decimal import Decimal
from statistics import median
from typing import NamedTuple

from immutables import Map

from fedtide.coordinator.ledger.valuation import ZERO

DAYS, FEWEST = 28, 7
"""So many days are looked at, and from so many on something is said."""
_DEVIATIONS = Decimal("6") * Decimal("1.4826")
_AT_LEAST = Decimal("1.5")
"""Times the median: where every day was the same, the deviation is 0."""
SCOPES = ("model", "region")

Hours = Map[int, Decimal]
"""What one model or region has cost in each hour, counted since 1970."""


class Anomaly(NamedTuple):
    """What one model or region has cost in one hour, and what that hour usually costs."""

    dimension: str
    value: str
    amount: Decimal
    usual: Decimal


def added(hours: Hours, hour: int, cost: Decimal) -> Hours:
    """With what was spent, and without what is too long ago to be looked at."""
    if hour not in hours:
        hours = Map({at: spent for at, spent in hours.items() if at > hour - 24 * DAYS - 24})
    return hours.set(hour, hours.get(hour, ZERO) + cost)


def found(dimension: str, value: str, hours: Hours, hour: int) -> Anomaly | None:
    """Whether an hour stands out."""
    amount = hours.get(hour)
    if not amount:
        return None
    before = [hours.get(at, ZERO) for at in range(hour - 24, min(hours) - 1, -24)][:DAYS]
    if len(before) < FEWEST:
        return None
    usual = median(before)
    deviation = median(abs(each - usual) for each in before)
    if amount > usual + _DEVIATIONS * deviation and amount > usual * _AT_LEAST:
        return Anomaly(dimension, value, amount, usual)
    return None
