"""A note on disk by which a process is found again, and not mistaken for another that has its number (Linux)."""

from __future__ import annotations

import json
import os
from pathlib import Path


def leave(note: Path, attempt: int) -> None:
    """Write down this process."""
    part = note.with_suffix(".part")
    part.write_text(json.dumps({"pid": os.getpid(), "attempt": attempt, "born": _born(os.getpid())}))
    part.replace(note)


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
