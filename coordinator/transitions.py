"""Legality of state machines as data: what may follow what, checked at every step, and drawn in the documentation."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from fedtide.fabric.errors import InvalidTransition


@dataclass(frozen=True, slots=True)
class Transition:
    """One change of state. `before` None: the thing comes into being."""

    before: type | None
    why: str
    after: type


def check_transition(allowed: Iterable[Transition], before: object | None, after: object) -> None:
    """Raises InvalidTransition unless `after` may follow `before`, or is in the same state."""
    was = None if before is None else type(before)
    if was is type(after) or any(t.before is was and t.after is type(after) for t in allowed):
        return
    name = "nothing" if was is None else was.__name__
    raise InvalidTransition(f"{type(after).__name__} may not follow {name}")
