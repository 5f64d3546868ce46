"""A time that nobody can turn back: the newest one that was signed, and what has passed here since.

The machine's own clock may be wrong by years, and whoever holds back new metadata would like old ones to stay good: so
neither is asked. While the machine is off no time passes, until somebody signs a later one.
"""

from __future__ import annotations

import time
from pathlib import Path

from fedtide.fabric.process.files import write_atomically

SAVE_EVERY_S = 3600.0


def _passed() -> float:
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class TrustedTime:
    """Seconds since the epoch, kept in a file."""

    def __init__(self, file: Path) -> None:
        self._file = file
        try:
            self._floor = float(file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            self._floor = 0.0
        self._at, self._saved = _passed(), self._floor

    def now(self) -> float:
        return self._floor + _passed() - self._at

    def told(self, signed: float) -> None:
        """A time that somebody has signed; an earlier one than now changes nothing."""
        if signed > self.now():
            self._floor, self._at = signed, _passed()
        if self.now() >= self._saved + SAVE_EVERY_S:
            self.save()

    def begin_at(self, signed: float) -> None:
        """Forget the time of before: those who said it count no more."""
        self._floor, self._at = signed, _passed()
        self.save()

    def save(self) -> None:
        self._saved = self.now()
        write_atomically(self._file, f"{self._saved:.0f}".encode())
