"""Peak memory of whole process trees, sampled from /proc."""

from __future__ import annotations

import os
import threading
from pathlib import Path


class PeakMemory:
    """Between `with`: samples the sum of resident memory of a process and all its descendants."""

    def __init__(self, pid: int, every_s: float = 0.1) -> None:
        self._pid = pid
        self._every_s = every_s
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self.peak_bytes = 0

    def __enter__(self) -> PeakMemory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(self._every_s):
            self.peak_bytes = max(self.peak_bytes, sum(_resident(p) for p in tree(self._pid)))


def tree(root: int) -> list[int]:
    """A process and its descendants, by parent and by session (sessions outlive a parent)."""
    parents: dict[int, tuple[int, int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rsplit(")", 1)[1].split()
            except OSError:
                continue
            parents[int(entry.name)] = (int(fields[1]), int(fields[3]))
    found = {root}
    grew = True
    while grew:
        more = {p for p, (parent, session) in parents.items() if parent in found or session in found} - found
        found |= more
        grew = bool(more)
    return sorted(found)


def _resident(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, IndexError):
        return 0
