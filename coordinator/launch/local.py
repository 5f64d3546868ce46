"""Aggregators as processes of this machine."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import subprocess
from collections import defaultdict
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

from fedtide.coordinator.commands import LaunchAggregator
from fedtide.coordinator.config import CoordinatorConfig
from fedtide.coordinator.launch.fork_server import Forked, ForkServer
from fedtide.coordinator.launch.launcher import GONE, CredentialsOf, Exit, Exited, worker_config
from fedtide.fabric.errors import TransientError
from fedtide.fabric.process import pid_file as process_note
from fedtide.fabric.process.files import write_atomically
from fedtide.fabric.process.python import module_command

log = logging.getLogger(__name__)


END_WITHIN_S = 10.0
ENVIRONMENTS = "environments"
RUN_FOLDERS = "runs"
"""Below the coordinator's folder: a work folder for each run."""

_Process = asyncio.subprocess.Process | Forked


class LocalLauncher:
    """One process per run. A PID file (its note) lets a restarted coordinator find and adopt it."""

    def __init__(self, root: Path, config: CoordinatorConfig, credentials: CredentialsOf, exited: Exited) -> None:
        self._root = root
        self._config = config
        self._credentials = credentials
        self._exited = exited
        self._watched: dict[str, tuple[int, asyncio.Task[None]]] = {}
        self._fork_server = ForkServer(root)
        self._preparing: asyncio.Task[object] | None = None
        self._locks: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)

    def prepare(self) -> None:
        """Load the libraries of an aggregator before the first run, if that is wanted."""
        if self._config.warm_aggregator:
            self._preparing = asyncio.create_task(self._fork_server.start(), name="fork-server-start")

    async def launch(self, command: LaunchAggregator, wanted: Callable[[], bool]) -> None:
        """Start the run's aggregator if it is still wanted, or adopt the one of this attempt that is there."""
        async with self._locks[command.run]:
            newer = process_note.attempt_of(self._note(command.run)) > command.attempt
            if wanted() and not newer:
                await self._end_others(command)
                await self._launch(command)

    async def _end_others(self, command: LaunchAggregator) -> None:
        """End the aggregator of an earlier attempt: two would take each other's replies."""
        pid = self._alive(command.run, None)
        if pid is not None and self._alive(command.run, command.attempt) is None:
            await _end(pid)
        attempt, watch = self._watched.get(command.run, (0, None))
        if watch is not None and attempt != command.attempt:
            await asyncio.wait({watch})

    async def _launch(self, command: LaunchAggregator) -> None:
        attempt, watch = self._watched.get(command.run, (0, None))
        if attempt == command.attempt and watch is not None and not watch.done():
            return
        folder = self._root / command.run
        folder.mkdir(parents=True, exist_ok=True)
        pid, process = self._alive(command.run, command.attempt), None
        if pid is None and (folder / f"attempt-{command.attempt}.json").exists():
            await self._exited(Exit(command.run, command.attempt, GONE, "it was gone when the coordinator came back"))
            return
        if pid is None:
            process = await self._start(command, folder)
        self._watched[command.run] = command.attempt, asyncio.create_task(self._watch(command, process))

    async def _start(self, command: LaunchAggregator, folder: Path) -> _Process:
        config = worker_config(command, self._config, str(folder.resolve()))
        config["packages"]["folder"] = str((self._config.packages.folder or self._root.parent / ENVIRONMENTS).resolve())
        credentials = self._credentials(command.run, command.life)
        if credentials is not None:
            shown = folder.resolve() / "aggregator.creds"
            credentials.save(shown)
            config["credentials"] = str(shown)
        file = folder / f"attempt-{command.attempt}.json"
        write_atomically(file, json.dumps(config).encode())
        try:
            process = await self._forked(file, command) or await self._spawn(file, command, folder)
        except (OSError, subprocess.SubprocessError) as exc:  # the latter: the child could not leave its note
            file.unlink()  # nothing was started: the next try must not take this attempt for one that is gone
            raise TransientError(f"no aggregator can be started: {exc}", "Free files, memory or disk space") from exc
        log.info("aggregator.launched", extra={"run": command.run, "pid": process.pid})
        return process

    async def _forked(self, file: Path, command: LaunchAggregator) -> Forked | None:
        if not self._config.warm_aggregator:
            return None
        return await self._fork_server.fork(file, self._note(command.run), command.attempt)

    async def _spawn(self, file: Path, command: LaunchAggregator, folder: Path) -> asyncio.subprocess.Process:
        with (folder / "aggregator.log").open("ab") as logfile:
            return await asyncio.create_subprocess_exec(
                *module_command("fedtide.aggregation"),
                str(file),
                stdout=logfile,
                stderr=logfile,
                start_new_session=True,
                # In the child, before it becomes the aggregator: there is no moment without a note.
                preexec_fn=partial(_claim_or_end, self._note(command.run), command.attempt),
            )

    async def _watch(self, command: LaunchAggregator, process: _Process | None) -> None:
        """Until no process of this attempt is left: the one that was started, or another that had claimed the note."""
        code = await process.wait() if process is not None else None
        left_by = process_note.left_by(self._note(command.run), command.attempt)
        if process is not None and left_by not in (None, process.pid):
            code = None  # it found another at work and ended: its code says nothing about that one
        while (pid := self._alive(command.run, command.attempt)) is not None:
            await _until_gone(pid)
            code = None
        process_note.remove(self._note(command.run), command.attempt)
        reason = _last_line(self._root / command.run / "aggregator.log")
        cpu_us = process.cpu_us if isinstance(process, Forked) else 0
        await self._exited(
            Exit(command.run, command.attempt, code if code is not None else GONE, reason, cpu_us=cpu_us)
        )

    def helpers(self) -> list[int]:
        pid = self._fork_server.pid
        return [pid] if pid is not None else []

    async def stop(self, run: str) -> None:
        """Ask the run's aggregator to end, if there is one."""
        async with self._locks[run]:
            pid = self._alive(run, None)
            if pid is not None:
                await _end(pid)

    def _note(self, run: str) -> Path:
        return self._root / run / "aggregator.pid"

    def _alive(self, run: str, attempt: int | None) -> int | None:
        return process_note.find(self._note(run), attempt)

    async def close(self) -> None:
        """Stop watching; the processes go on and are adopted by the next coordinator."""
        await self._fork_server.close()
        tasks = [task for _, task in self._watched.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _claim_or_end(note: Path, attempt: int) -> None:
    if not process_note.claim(note, attempt):
        os._exit(0)  # the fork server was slow, not dead: its fork is the aggregator


async def _end(pid: int) -> None:
    """Ask a process to end; one that does not is killed."""
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGTERM)
    try:
        async with asyncio.timeout(END_WITHIN_S):
            await _until_gone(pid)
    except TimeoutError:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        await _until_gone(pid)


async def _until_gone(pid: int) -> None:
    try:
        handle = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    loop = asyncio.get_running_loop()
    gone = loop.create_future()
    loop.add_reader(handle, gone.set_result, None)
    try:
        await gone
    finally:
        loop.remove_reader(handle)
        os.close(handle)


def _last_line(file: Path) -> str:
    try:
        lines = file.read_text(errors="replace").strip().splitlines()
    except OSError:
        return ""
    return lines[-1][:500] if lines else ""
