"""What a ServerApp prints and logs: taken from its standard output, kept in a file, and stored with the run."""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from fedtide.fabric import logs
from fedtide.fabric.flower.app_log import AppLog, mark_records
from fedtide.fabric.messages.logs import LogLine

_READ = 65_536
_PAUSE_S = 0.05
"""What comes meanwhile is read at once: a round logs many lines, and each reading stops the app for a moment."""


class AppOutput:
    """From `start` on, lines go to `ship`; `stop` waits until all have gone there."""

    def __init__(self, file: Path, ship: Callable[[list[LogLine]], None]) -> None:
        self._log = AppLog(file)
        self._ship = ship

    def start(self) -> None:
        """Take this process's standard output and error; the raw text still goes where it went."""
        source, target = os.pipe()
        self._own = os.dup(2)
        for number in (1, 2):
            os.dup2(target, number)
        os.close(target)
        mark_records()
        ours = logging.getLogger("fedtide")  # many lines a round, and nothing of the app
        ours.propagate, ours.handlers = False, [logs.handler(os.fdopen(os.dup(self._own), "w", buffering=1))]
        self._thread = threading.Thread(target=self._read, args=(source,), name="app-output", daemon=True)
        self._thread.start()

    def _read(self, source: int) -> None:
        while data := os.read(source, _READ):
            self._take(self._log.feed(data, ""))
            time.sleep(_PAUSE_S)
        self._take(self._log.flush(""))
        os.close(source)

    def _take(self, lines: list[LogLine]) -> None:
        if lines:
            os.write(self._own, "".join(f"{line.at.isoformat()} {line.level} {line.text}\n" for line in lines).encode())
            self._ship(lines)

    def stop(self) -> None:
        """Give the standard output back, after all lines have gone to `ship`; again changes nothing."""
        if not self._thread.is_alive():
            return
        sys.stdout.flush()
        sys.stderr.flush()
        for number in (1, 2):
            os.dup2(self._own, number)
        self._thread.join(timeout=10)
