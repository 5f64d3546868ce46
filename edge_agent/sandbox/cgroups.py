"""Limits of what apps use, by the kernel: a control group of their own, where the agent was given one to divide.

cgroup v2 (https://docs.kernel.org/admin-guide/cgroup-v2.html), delegated to the agent's user: systemd's `Delegate=yes`,
or a container whose cgroup is writable. A group that has controllers for others may hold no process itself: so the
agent moves into one below its own.
"""

from __future__ import annotations

import logging
import os
from contextlib import suppress
from pathlib import Path

log = logging.getLogger(__name__)

WANTED = ("cpu", "memory", "pids")
PERIOD_US = 100_000
_AGENT, _APPS = "agent", "apps"


class Cgroup:
    """The group of all apps of a node."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    @classmethod
    def delegated(cls, root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> Cgroup | None:
        """The group, made in that of this process; None: this process may divide none."""
        try:
            (line,) = [line for line in own.read_text().splitlines() if line.startswith("0::")]
            here = root / line.removeprefix("0::/")
            here = here.parent if here.name == _AGENT else here  # an agent that was started again
            there = set((here / "cgroup.controllers").read_text().split())
            if not set(WANTED) <= there or not os.access(here / "cgroup.subtree_control", os.W_OK):
                return None
            for name in (_AGENT, _APPS):
                (here / name).mkdir(exist_ok=True)
            for pid in (here / "cgroup.procs").read_text().split():
                (here / _AGENT / "cgroup.procs").write_text(pid)
            (here / "cgroup.subtree_control").write_text(" ".join(f"+{name}" for name in WANTED))
        except (OSError, ValueError) as exc:
            log.debug("cgroup.not_delegated", extra={"reason": str(exc)})
            return None
        return cls(here / _APPS)

    def enter(self) -> None:
        """Move this process into the group, and with it all that it starts."""
        with suppress(OSError):  # it is gone: what it would have limited is not limited
            (self._folder / "cgroup.procs").write_text(str(os.getpid()))

    def limit(self, *, cpus: float | None, memory_bytes: int | None, processes: int) -> None:
        """What all processes of the group may use together, from now on; None: as much as there is."""
        quota = f"{round(cpus * PERIOD_US)}" if cpus is not None else "max"
        values = {
            "cpu.max": f"{quota} {PERIOD_US}",
            "memory.max": str(memory_bytes) if memory_bytes is not None else "max",
            "memory.oom.group": "1",  # all of a task, not the one that happened to ask
            "pids.max": str(processes),
        }
        for name, value in values.items():
            try:
                (self._folder / name).write_text(value)
            except OSError as exc:
                log.warning("cgroup.limit_not_set", extra={"limit": name, "reason": str(exc)})
