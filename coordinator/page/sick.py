"""Which nodes need a look, and why: away, warned of, failed in a roll-out, refused in rounds. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain, islice
from typing import NamedTuple, TypeVar

from fedtide.coordinator.rollouts import waves
from fedtide.coordinator.state import World

LOOKED_AT = 20
"""So many of the newest runs and roll-outs."""
NO_FAULT = frozenset({"not_needed", "stale"})
"""Of a node: others were enough, or nobody wanted it any more."""
V = TypeVar("V")
Reason = tuple[str, str, str]
"""Node, why, and where more of it is told."""


class Sick(NamedTuple):
    """`why`: each reason, and where more of it is told (a path below the page; empty: at the node)."""

    node: str
    region: str
    why: list[tuple[str, str]]


def sick(world: World, warned: Mapping[str, Sequence[str]]) -> list[Sick]:
    """Those with most reasons first.

    Args:
        warned: by node, what heartbeats say of it.
    """
    found: dict[str, list[tuple[str, str]]] = {}
    for name, why, at in chain(_away(world), _warned(warned), _failed(world), _refused(world)):
        if name in world.nodes:
            found.setdefault(name, []).append((why, at))
    ordered = sorted(found.items(), key=lambda item: (-len(item[1]), item[0]))
    return [Sick(name, world.nodes[name].region, why) for name, why in ordered]


def _away(world: World) -> Iterator[Reason]:
    for name, node in world.nodes.items():
        if not node.online:
            yield name, f"offline: {node.reason}" if node.reason else "offline", ""


def _warned(warned: Mapping[str, Sequence[str]]) -> Iterator[Reason]:
    for name, warnings in warned.items():
        for warning in warnings:
            yield name, warning, ""


def _failed(world: World) -> Iterator[Reason]:
    """By the newest roll-out that has tried each node: what it did before is over."""
    known: set[str] = set()
    for key, rollout in _newest(world.rollouts):
        for wave in rollout.waves:
            for name, state in waves.nodes_of(wave).items():
                failed = waves.is_failed(state)
                if failed and name not in known:
                    yield name, f"failed in a roll-out: {state.reason or state.phase}", f"rollouts/{key}"
                if failed or state.phase == "confirmed":
                    known.add(name)


def _refused(world: World) -> Iterator[Reason]:
    """By the newest run in which each node has answered."""
    known: set[str] = set()
    for key, run in _newest(world.runs):
        tallies = [tally for each in run.rounds.values() for tally in each.phases.values()]
        faults = Counter(
            (name, refused.category)
            for tally in tallies
            for name, refused in tally.refused.items()
            if refused.category not in NO_FAULT
        )
        for (name, category), count in faults.items():
            if name not in known:
                times = f", {count} times" if count > 1 else ""
                yield name, f"answers refused: {category.replace('_', ' ')}{times}", f"runs/{key}"
        known |= {name for tally in tallies for name in tally.received} | {name for name, _ in faults}


def _newest(table: Mapping[str, V]) -> list[tuple[str, V]]:
    return [(key, table[key]) for key in islice(reversed(list(table)), LOOKED_AT)]
