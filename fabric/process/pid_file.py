"""A note on disk by which a process is found again, and not mistaken for another that has its number (Linux)."""

from __future__ import annotations

import json
import os
from pathlib import Path


def leave(note: Path, attempt: int, pid: int | None = None) -> None:
    """Write down a process (None: this one)."""
    pid = pid if pid is not None else os.getpid()
    part = note.with_suffix(".part")
    part.write_text(json.dumps({"pid": pid, "attempt": attempt, "born": _born(pid)}))
    part.replace(note)


def remove(note: Path, pid: int) -> None:
    """Forget a process that is gone; a note that another one has left meanwhile stays."""
    try:
        theirs = json.loads(note.read_text())["pid"] != pid
    except (OSError, ValueError, KeyError):
        return
    if not theirs:
        note.unlink(missing_ok=True)


def attempt_of(note: Path) -> int:
    """Which attempt left `note` last; 0 if there is none."""
    try:
        return int(json.loads(note.read_text())["attempt"])
    except (OSError, ValueError, KeyError):
        return 0


def find(note: Path, attempt: int | None) -> int | None:
    """The pid of the process that left `note` (for `attempt`, or None: for any), if it lives."""
    try:
        told = json.loads(note.read_text())
        pid = int(told["pid"])
        alive = _born(pid) == told["born"]
    except (OSError, ValueError, KeyError, IndexError):
        return None
    return pid if alive and attempt in (None, told["attempt"]) else None


def _born(pid: int) -> int:
    """When a process started, in clock ticks since boot; a zombie is not alive."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return -1 if fields[0] == "Z" else int(fields[19])
