"""Which release was made of which, as a drawing: a dot for each, newest at the top, a line down to its base. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

ROW, LANE, MARGIN, TEXT = 34.0, 22.0, 16.0, 420.0
MOST_LANES = 12
"""Of more, the rest share the last one."""


class Dot(NamedTuple):
    version: int
    x: float
    y: float


class Lineage(NamedTuple):
    """`lines`: paths (SVG); those to what is not shown lead out. `text_x`: where every row's text begins."""

    dots: list[Dot]
    lines: list[str]
    text_x: float
    width: float
    height: float


def lineage(versions: Sequence[int], base_of: Mapping[int, int]) -> Lineage:
    """Lay out some releases.

    Args:
        versions: newest first, each above its base.
        base_of: the release that one was trained from; those made from nothing are missing.
    """
    rows = {version: row for row, version in enumerate(versions)}
    lanes: list[int | None] = []
    """By lane, the release that its line leads down to."""
    lane_of: dict[int, int] = {}
    for version in versions:
        leads_here = [number for number, wanted in enumerate(lanes) if wanted == version]
        lane = leads_here[0] if leads_here else _free(lanes)
        for number in leads_here:
            lanes[number] = None
        lane_of[version] = lane
        lanes[lane] = base_of.get(version)
    dots = [Dot(version, _x(lane_of[version]), _y(row)) for version, row in rows.items()]
    lines = [_line(dot, lane_of, rows, base_of[dot.version]) for dot in dots if dot.version in base_of]
    text_x = _x(max(lane_of.values(), default=0) + 1)
    return Lineage(dots, lines, text_x, text_x + TEXT, _y(len(versions) - 0.5))


def _free(lanes: list[int | None]) -> int:
    for number, wanted in enumerate(lanes):
        if wanted is None:
            return number
    if len(lanes) < MOST_LANES:
        lanes.append(None)
    return len(lanes) - 1


def _line(dot: Dot, lane_of: Mapping[int, int], rows: Mapping[int, int], base: int) -> str:
    """Down its own lane, and over to its base's just above that."""
    if base not in rows:
        return f"M{dot.x:g} {dot.y:g}V{_y(len(rows) - 0.5):g}"
    x, y = _x(lane_of[base]), _y(rows[base])
    bend = y - ROW / 2
    last = f"V{y:g}" if x == dot.x else f"C{dot.x:g} {y:g} {x:g} {bend:g} {x:g} {y:g}"
    return f"M{dot.x:g} {dot.y:g}V{bend:g}{last}"


def _x(lane: float) -> float:
    return MARGIN + LANE * lane


def _y(row: float) -> float:
    return MARGIN + ROW * row
