"""Aggregators that start in milliseconds: the launcher's side of `fedtide.aggregation.fork_server`."""

from __future__ import annotations

import asyncio
import json
import logging
from pathlib import Path
from typing import Any

from fedtide.fabric.process.python import module_command

log = logging.getLogger(__name__)

LONGEST_LINE = 64 * 1024
ANSWER_WITHIN_S = 60.0
"""It may have to load its libraries first."""


class Forked:
    """An aggregator that was forked. `code`: how it ended; None: unknown, because the fork server ended before.

    `cpu_us`: the CPU time that it has used, once it has ended.
    """

    cpu_us = 0

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.code: asyncio.Future[int | None] = asyncio.get_running_loop().create_future()

    async def wait(self) -> int | None:
        return await asyncio.shield(self.code)


class ForkServer:
    """At most one server process, started when it is needed. It ends by itself with this process, whose end closes its
    standard input; what it has forked goes on.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._process: asyncio.subprocess.Process | None = None
        self._reading: asyncio.Task[None] | None = None
        self._asked: dict[str, asyncio.Future[Forked | None]] = {}
        self._running: dict[int, Forked] = {}
        self._starting = asyncio.Lock()

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process is not None else None

    async def start(self) -> asyncio.subprocess.Process:
        """The server, started if it is not there. It takes requests while it still loads its libraries."""
        async with self._starting:
            if self._process is None or self._process.returncode is not None:
                self._process = await self._start()
                self._reading = asyncio.create_task(self._read(self._process), name="fork-server")
            return self._process

    async def _start(self) -> asyncio.subprocess.Process:
        self._folder.mkdir(parents=True, exist_ok=True)
        with (self._folder / "fork-server.log").open("ab") as logfile:
            return await asyncio.create_subprocess_exec(
                *module_command("fedtide.aggregation"),
                "--fork-server",
                str(self._folder),  # shows in a process list whose it is
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=logfile,
                limit=LONGEST_LINE,
                start_new_session=True,
            )

    async def fork(self, config: Path, note: Path, attempt: int) -> Forked | None:
        """An aggregator with this configuration; None if the server cannot run.

        Args:
            note: the PID file that the new process leaves before anything else.
        """
        process = await self.start()
        assert process.stdin is not None
        answer: asyncio.Future[Forked | None] = asyncio.get_running_loop().create_future()
        self._asked[str(config)] = answer
        try:
            request = {"config": str(config), "note": str(note), "attempt": attempt}
            process.stdin.write(f"{json.dumps(request)}\n".encode())
            await process.stdin.drain()
            async with asyncio.timeout(ANSWER_WITHIN_S):
                return await answer
        except (OSError, TimeoutError) as exc:
            log.warning("fork_server.does_not_answer", extra={"reason": f"{type(exc).__name__}: {exc}"})
            if process.returncode is None:
                process.kill()
            return None
        finally:
            self._asked.pop(str(config), None)

    async def _read(self, process: asyncio.subprocess.Process) -> None:
        assert process.stdout is not None
        try:
            async for line in process.stdout:
                try:
                    self._take(json.loads(line))
                except (ValueError, KeyError) as exc:
                    log.warning("fork_server.says", extra={"line": line[:200], "reason": str(exc)})
        finally:
            if process.returncode is None:
                process.kill()  # nobody would hear what it says any more
            code = await process.wait()
            log.warning("fork_server.ended", extra={"code": code})
            for answer in self._asked.values():
                if not answer.done():
                    answer.set_result(None)
            for forked in self._running.values():
                forked.code.set_result(None)
            self._running.clear()

    def _take(self, told: dict[str, Any]) -> None:
        if "code" in told:
            ended = self._running.pop(told["pid"])
            ended.cpu_us = told["cpu_us"]
            ended.code.set_result(told["code"])
            return
        forked = self._running[told["pid"]] = Forked(told["pid"])
        if (answer := self._asked.get(told["config"])) is not None and not answer.done():
            answer.set_result(forked)

    async def close(self) -> None:
        """End the server; what it has forked goes on."""
        if self._process is not None and self._process.stdin is not None:
            self._process.stdin.close()
        if self._reading is not None:
            await asyncio.gather(self._reading, return_exceptions=True)
