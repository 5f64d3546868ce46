"""An always-valid sequential test for the mean of bounded numbers, from counts alone. Pure.

A bettor stakes a fixed share of its capital on every number against "the mean is at most b": after
n numbers x it holds K(s) = prod(1 + s (x - b)). If the claim is true, K is a non-negative
supermartingale, so by Ville's inequality it ever reaches 1/alpha with probability at most alpha:
one may look after every number and stop at will. A uniform mixture over a grid of stakes needs no
guess of the effect, and as each factor depends on x only, the order of the numbers does not matter:
sums over nodes are enough.

Waudby-Smith and Ramdas, "Estimating means of bounded random variables by betting", JRSS-B 86(1),
2024, section 4 (constant stakes: "Kelly/ConBo", appendix B.4); Ville 1939.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

_STAKES = tuple((k + 0.5) / 24 for k in range(24))
"""Shares of the largest stake that can never lose everything."""

Counts = Mapping[float, int]
"""How often each value was seen."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """`above`: shown to be above the bound; `below`: shown to be below; else about `more` numbers are missing."""

    above: bool
    below: bool
    mean: float
    n: int
    more: int = 0


def judge(counts: Counts, bound: float, lowest: float, highest: float, alpha: float) -> Verdict:
    """Is the mean above or below `bound`?

    Args:
        lowest, highest: every number lies between them, and the bound strictly between them.
        alpha: chance of saying "above" though it is not, and of saying "below" though it is not,
            however often one looks.
    """
    n = sum(counts.values())
    mean = sum(value * count for value, count in counts.items()) / n if n else 0.0
    needed = math.log(1 / alpha)
    up = _log_capital(counts, bound, 1 / (bound - lowest))
    down = _log_capital({-v: c for v, c in counts.items()}, -bound, 1 / (highest - bound))
    if up >= needed or down >= needed:
        return Verdict(up >= down, down > up, mean, n)
    return Verdict(False, False, mean, n, _missing(max(up, down), needed, n))


def _log_capital(counts: Counts, bound: float, most: float) -> float:
    """Logarithm of the mixture's capital against "the mean is at most `bound`"."""
    logs = [
        sum(count * math.log1p(share * most * (value - bound)) for value, count in counts.items() if count)
        for share in _STAKES
    ]
    top = max(logs)
    return top + math.log(sum(math.exp(each - top) for each in logs) / len(logs))


def _missing(have: float, needed: float, n: int) -> int:
    """How many more numbers are needed if the evidence keeps growing at this rate; without growth, as many again."""
    if n == 0:
        return 1
    growth = have / n
    if growth <= 0:
        return max(10, n)
    missing = min(10.0 * n, (needed - have) / growth)  # infinite, if it hardly grows
    return max(1, math.ceil(missing))
