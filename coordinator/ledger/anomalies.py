"""Hours that cost much more than such hours usually do. Pure.

What is usual is the median of the same hour of the day over the days before, and what is much is told by the median
absolute deviation (Hampel's identifier; Leys et al. 2013): both bear a few bad days in the history.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from decimal import Decimal
from statistics import median
from typing import NamedTuple

from fedtide.coordinator.ledger.valuation import UNALLOCATED, ZERO, Valued, value_of

DAYS, FEWEST = 28, 7
"""So many days are looked at, and from so many on something is said."""
_DEVIATIONS = Decimal("6") * Decimal("1.4826")
_AT_LEAST = Decimal("1.5")
"""Times the median: where every day was the same, the deviation is 0."""
_SCOPES = ("model", "region")


class Anomaly(NamedTuple):
    """What one model or region has cost in one hour, and what that hour usually costs."""

    dimension: str
    value: str
    amount: Decimal
    usual: Decimal


def found(lines: Iterable[Valued], hour: int) -> Iterator[Anomaly]:
    """What stands out in an hour (counted since 1970).

    Args:
        lines: those of the ledger, also of later hours.
    """
    earliest = hour - 24 * DAYS
    spent: dict[tuple[str, str], dict[int, Decimal]] = {}
    first: dict[tuple[str, str], int] = {}
    for each in lines:
        at = each.line.hour
        if not earliest <= at <= hour or not each.cost.cost:
            continue
        for dimension in _SCOPES:
            if (value := value_of(each, dimension)) == UNALLOCATED:
                continue
            first[dimension, value] = min(first.get((dimension, value), at), at)
            if (hour - at) % 24 == 0:
                hours = spent.setdefault((dimension, value), {})
                hours[at] = hours.get(at, ZERO) + each.cost.cost
    for (dimension, value), hours in sorted(spent.items()):
        if (amount := hours.get(hour)) is None:
            continue
        before = [hours.get(at, ZERO) for at in range(hour - 24, first[dimension, value] - 1, -24)]
        if len(before) < FEWEST:
            continue
        usual = median(before)
        deviation = median(abs(each - usual) for each in before)
        if amount > usual + _DEVIATIONS * deviation and amount > usual * _AT_LEAST:
            yield Anomaly(dimension, value, amount, usual)
