"""A spare aggregator process: its libraries are loaded, it waits for the next run. Importing Flower takes seconds."""

from __future__ import annotations

import asyncio
import logging
import sys
from collections.abc import Callable
from pathlib import Path

log = logging.getLogger(__name__)

REFILL_AFTER_S = 5.0
"""The next spare starts this much later, so that it does not slow down the run that took the last one."""


class SpareProcess:
    """Holds at most one waiting process. It ends by itself when this process does: its standard input closes."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._process: asyncio.subprocess.Process | None = None
        self._refill: asyncio.Task[None] | None = None

    def prepare(self, after_s: float = 0.0) -> None:
        """Start one soon, unless one is there or coming."""
        if self._refill is None or self._refill.done():
            self._refill = asyncio.create_task(self._start(after_s), name="spare-aggregator")

    async def _start(self, after_s: float) -> None:
        await asyncio.sleep(after_s)
        if self._process is not None and self._process.returncode is None:
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        with (self._folder / "spare.log").open("ab") as logfile:
            self._process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "fedtide.aggregation",
                "--wait",
                str(self._folder),  # shows in a process list whose it is
                stdin=asyncio.subprocess.PIPE,
                stdout=logfile,
                stderr=logfile,
                start_new_session=True,
            )

    async def give(self, config: Path, note: Callable[[int], None]) -> asyncio.subprocess.Process | None:
        """Write down the spare's pid, then hand it its configuration; None if there is no spare."""
        process, self._process = self._process, None
        self.prepare(REFILL_AFTER_S)
        if process is None or process.returncode is not None or process.stdin is None:
            return None
        try:
            note(process.pid)
            process.stdin.write(f"{config}\n".encode())
            await process.stdin.drain()
        except OSError:
            log.warning("spare.was_gone", extra={"pid": process.pid})
            return None
        process.stdin.close()
        return process

    async def close(self) -> None:
        if self._refill is not None:
            self._refill.cancel()
            await asyncio.gather(self._refill, return_exceptions=True)
        if self._process is not None and self._process.returncode is None:
            self._process.kill()
            await self._process.wait()
