"""How a term of a weighted sum becomes an integer, so that sums do not depend on their order.

A term x * w is kept as a multiple of 2**-exponent, rounded to the nearest (ties to even). Integers add
exactly, so partial sums of any threads, regions or restarts merge to the same bytes.

There are two lanes of int64. The *fine* lane takes terms below 2**term_bits units; a larger
term goes to the *coarse* lane, whose unit is 2**COARSE_SHIFT times as large: a running variance
that grows a thousandfold in one round still counts, with a relative resolution of 2**-27.
Which lane a term takes depends on the term alone.

Bounds, for N <= max_terms terms and the total weight W: no lane overflows; the mean differs from
the exact one by at most N / (2 * W) units of 2**-exponent (fine lane), before it is rounded to
the dtype of its tensor.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

SUM_BITS = 62
"""A lane's sum stays below 2**62: an int64 with a bit to spare."""

MAX_TERM_BITS = 51
"""A product below 2**51 units is rounded exactly by one addition in float64 (see kernels)."""

COARSE_SHIFT = 24

USUAL_WEIGHT = 2.0**16
"""Terms up to this weight, of values up to HEADROOM times the largest of the present model, take the fine lane."""

HEADROOM = 4.0

LEAST_MAGNITUDE = 2.0**-60


@dataclass(frozen=True, slots=True)
class FixedPoint:
    """The fixed-point format of one tensor in one round; all processes that sum parts of it must use it."""

    exponent: int
    """A fine unit is 2**-exponent."""
    term_bits: int
    """A fine term is below 2**term_bits units, a coarse one below that times 2**COARSE_SHIFT."""

    @classmethod
    def agree(cls, largest: float, max_terms: int) -> FixedPoint:
        """The format for updates to a tensor whose largest magnitude is `largest` (0 counts as 1).

        Raises:
            ValueError: `largest` is not finite, or `max_terms` is not from 1 to 2**24.
        """
        if not (math.isfinite(largest) and 1 <= max_terms <= 2**24):
            raise ValueError(f"no fixed point for values up to {largest} and {max_terms} terms")
        term_bits = min(MAX_TERM_BITS, SUM_BITS - math.ceil(math.log2(max_terms)))
        reach = HEADROOM * max(LEAST_MAGNITUDE, largest or 1.0) * USUAL_WEIGHT
        return cls(term_bits - math.ceil(math.log2(reach)), term_bits)

    @property
    def scale(self) -> float:
        """Number of fine units in 1.0."""
        return math.ldexp(1.0, self.exponent)

    def holds(self, term: float) -> bool:
        """Whether a term fits the coarse lane, if not the fine one."""
        return abs(term) * self.scale < float(self.half << COARSE_SHIFT)

    @property
    def half(self) -> int:
        """Terms of [-half, half) units fit a lane."""
        return 1 << self.term_bits
