"""How well a node can keep an app from the rest of the machine."""

from __future__ import annotations

import os
from functools import cache
from typing import Literal

from fedtide.edge_agent.sandbox import bubblewrap, landlock
from fedtide.edge_agent.sandbox.users import user_of
from fedtide.fabric.errors import ConfigError

Level = Literal["none", "landlock", "bubblewrap", "user"]
ORDER: tuple[Level, ...] = ("none", "landlock", "bubblewrap", "user")
"""Weakest first. `landlock`: files, signals, TCP and system calls; `bubblewrap`: that, in namespaces of its own;
`user`: that, as a user of its own."""


def level_of(sandbox: str, apps_user: str | None) -> Level:
    """What an agent with these settings keeps apps in.

    Raises:
        ConfigError: it cannot let them be another user.
    """
    if apps_user is None:
        return "none" if sandbox == "off" else offered()
    user = user_of(apps_user)
    lacks = []
    if sandbox == "off":
        lacks.append("a sandbox (sandbox = auto)")
    if os.geteuid() != 0:
        lacks.append("an agent that runs as root")
    elif not (landlock.abi() and bubblewrap.works(user)):
        lacks.append("bubblewrap, and a kernel with Landlock (5.13)")
    if lacks:
        raise ConfigError(
            "agent.apps_user", f"needs {' and '.join(lacks)}", "Or leave it out: apps run as the agent does"
        )
    return "user"


def what_to_do(wanted: Level) -> str:
    """On a node that keeps apps in less."""
    if wanted == "user":
        return "Let the agent run as root, with apps_user in its settings"
    return "Install bubblewrap, or a kernel with Landlock (5.13)"


@cache
def offered() -> Level:
    """The strongest that this machine offers to this user, but for another user to run as."""
    if not landlock.abi():
        return "none"
    return "bubblewrap" if bubblewrap.works() else "landlock"


def is_enough(level: Level, wanted: Level) -> bool:
    return ORDER.index(level) >= ORDER.index(wanted)
