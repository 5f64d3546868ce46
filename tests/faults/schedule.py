"""What is killed, when, and how: points drawn from a seed. Pure.

Each point belongs to one run. The same seed gives the same points on every machine; what state the
victim is in at the moment is for the machine to say, and is printed.
"""

from __future__ import annotations

import random
import signal
from dataclasses import dataclass

MOMENTS = (
    "run.requested",
    "run.aggregator_started",
    "round.opened",
    "round.update_received",
    "round.collected",
    "round.closed",
    "run.completed",
)

VICTIMS = ("coordinator", "aggregator", "aggregator", "hub", "leaf", "agent", "agent", "link", "disk", "all")


@dataclass(frozen=True, slots=True)
class Point:
    """`victim` suffers `how`, `delay_s` after the `nth` event of kind `moment`; what can be undone lasts `lasts_s`."""

    number: int
    moment: str
    nth: int
    delay_s: float
    victim: str
    how: str
    lasts_s: float


def points(seed: int, count: int, regions: list[str], nodes: list[str]) -> list[Point]:
    """`count` points of `seed`."""
    return [_point(random.Random(f"{seed}/{number}"), number, regions, nodes) for number in range(1, count + 1)]


def _point(rng: random.Random, number: int, regions: list[str], nodes: list[str]) -> Point:
    moment = rng.choice(MOMENTS)
    nth = {"round.opened": 6, "round.collected": 6, "round.closed": 3, "round.update_received": 24}.get(moment, 1)
    kind = rng.choice(
        ["coordinator", "aggregator", "aggregator", "hub", "leaf", "agent", "agent", "link", "disk", "all"]
    )
    victim = {"leaf": f"leaf-{rng.choice(regions)}", "agent": f"agent-{rng.choice(nodes)}"}.get(kind, kind)
    signals = [signal.SIGKILL, signal.SIGTERM, signal.SIGSTOP]
    how = {"link": f"cut {rng.choice(regions)}", "disk": f"full {rng.choice(nodes)}", "all": "SIGKILL"}.get(
        kind, signal.Signals(rng.choice(signals)).name
    )
    return Point(number, moment, rng.randint(1, nth), rng.uniform(0, 0.4), victim, how, rng.uniform(0.5, 4.0))
