"""Numbers over rounds as the points of a line in a drawing. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

WIDTH, HEIGHT, MARGIN = 320.0, 96.0, 6.0


class Curve(NamedTuple):
    """`points`: for an SVG polyline of WIDTH by HEIGHT; `first`, `last`, `least`, `most`: values."""

    name: str
    points: str
    first: float
    last: float
    least: float
    most: float
    rounds: int


def curve(name: str, values: Sequence[tuple[int, float | None]]) -> Curve | None:
    """A line through (round, value); None if fewer than two values are finite numbers."""
    known = [(x, y) for x, y in values if y is not None and math.isfinite(y)]
    if len(known) < 2:
        return None
    ys = [y for _, y in known]
    least, most = min(ys), max(ys)
    first_x, span_x = known[0][0], max(known[-1][0] - known[0][0], 1)
    span_y = (most - least) or 1.0
    points = " ".join(
        f"{MARGIN + (x - first_x) / span_x * (WIDTH - 2 * MARGIN):.1f},"
        f"{HEIGHT - MARGIN - (y - least) / span_y * (HEIGHT - 2 * MARGIN):.1f}"
        for x, y in known
    )
    return Curve(name, points, ys[0], ys[-1], least, most, len(known))
