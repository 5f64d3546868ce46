"""A process with all that it has started, ended together: also what has left its group or session."""

from __future__ import annotations

import os
import signal
from contextlib import suppress
from pathlib import Path

from fedtide.fabric.process.metering import descendants


def end_family(pid: int) -> None:
    """Kill a process and its descendants. They are stopped first, so that none can start another meanwhile."""
    family: set[int] = set()
    while fresh := {pid, *descendants(pid)} - family:
        for each in fresh:
            _send(each, signal.SIGSTOP)
        family |= fresh
    for each in family:
        _send(each, signal.SIGKILL)


def is_dead(pid: int) -> bool:
    """Whether it has ended, though nobody may have asked for its status yet."""
    return _state(pid) in "ZX"


def is_still(pid: int) -> bool:
    """Whether it has been stopped, or has ended."""
    return _state(pid) in "TtZX"


def _state(pid: int) -> str:
    """One letter (proc_pid_stat(5))."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "X"


def _send(pid: int, number: signal.Signals) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.kill(pid, number)
