"""PID files: find a process again, and never mistake another process with the same pid for it."""

from __future__ import annotations

import fcntl
import json
import os
import signal
from contextlib import suppress
from pathlib import Path

import psutil

from fedtide.fabric.process.files import write_atomically


def claim(note: Path, attempt: int) -> bool:
    """Write down this process as the one of `attempt`; ends the one of an earlier attempt: two would do the same work.

    Returns:
        False if this process must not work: one of this attempt lives, or a later attempt was made.

    Raises:
        OSError: the note cannot be written.
    """
    with note.with_suffix(".lock").open("w") as lock:  # released when it is closed, and when this process dies
        fcntl.flock(lock, fcntl.LOCK_EX)
        other = find(note, None)
        if attempt_of(note) > attempt or (other is not None and attempt_of(note) == attempt):
            return False
        if other is not None:
            with suppress(ProcessLookupError):
                os.kill(other, signal.SIGKILL)
        pid = os.getpid()
        write_atomically(note, json.dumps({"pid": pid, "attempt": attempt, "born": _born(pid)}).encode())
        return True


def remove(note: Path, attempt: int) -> None:
    """Forget the process of an attempt, which is gone; a note of another attempt stays."""
    if attempt_of(note) == attempt:
        note.unlink(missing_ok=True)


def attempt_of(note: Path) -> int:
    """Which attempt left `note` last; 0 if there is none."""
    found = _read(note)
    return found[1] if found is not None else 0


def find(note: Path, attempt: int | None) -> int | None:
    """The pid of the process that left `note` (for `attempt`, or None: for any), if it lives."""
    found = _read(note)
    if found is None or attempt not in (None, found[1]) or _born(found[0]) != found[2]:
        return None
    return found[0]


def left_by(note: Path, attempt: int) -> int | None:
    """The pid of the process that left `note` for `attempt`, whether it lives or not."""
    found = _read(note)
    return found[0] if found is not None and found[1] == attempt else None


def is_alive(pid: int) -> bool:
    """Whether there is such a process; a zombie is not alive."""
    return _born(pid) is not None


def _read(note: Path) -> tuple[int, int, float | None] | None:
    try:
        noted = json.loads(note.read_text())
        return int(noted["pid"]), int(noted["attempt"]), noted["born"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _born(pid: int) -> float | None:
    """When a process started, in seconds since boot: setting the clock does not change it. None: gone, or a zombie."""
    try:
        process = psutil.Process(pid)
        return (
            None if process.status() == psutil.STATUS_ZOMBIE else round(process.create_time() - psutil.boot_time(), 2)
        )
    except psutil.Error:
        return None
