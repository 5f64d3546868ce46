"""How well a node can keep an app from the rest of the machine."""

from __future__ import annotations

from functools import cache
from typing import Literal

from fedtide.edge_agent.sandbox import bubblewrap, landlock

Level = Literal["none", "landlock", "bubblewrap"]
ORDER: tuple[Level, ...] = ("none", "landlock", "bubblewrap")
"""Weakest first. `landlock`: files, signals, TCP and system calls; `bubblewrap`: that, in namespaces of its own."""


@cache
def offered() -> Level:
    """The strongest that this machine offers to this user."""
    if not landlock.abi():
        return "none"
    return "bubblewrap" if bubblewrap.works() else "landlock"


def is_enough(level: Level, wanted: Level) -> bool:
    return ORDER.index(level) >= ORDER.index(wanted)
