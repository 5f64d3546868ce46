"""Aggregators on one machine: real forks, and launches that fail for want of files or memory."""

from __future__ import annotations

import asyncio
import errno
import os
import signal
import subprocess
from pathlib import Path

import pytest

from fedtide.coordinator.commands import LaunchAggregator
from fedtide.coordinator.config import CoordinatorConfig
from fedtide.coordinator.launch import local as launcher_module
from fedtide.coordinator.launch.fork_server import ForkServer
from fedtide.coordinator.launch.launcher import GONE, Exit
from fedtide.coordinator.launch.local import LocalLauncher
from fedtide.fabric.errors import TransientError
from fedtide.fabric.plans.run_spec import RunSpec
from fedtide.fabric.process import pid_file
from tests.scenarios.build import APP


async def test_a_fork_that_fails_ends_with_its_code_and_leaves_its_note_and_its_reason(tmp_path: Path) -> None:
    server = ForkServer(tmp_path)
    run = tmp_path / "run-1"
    run.mkdir()
    (run / "attempt-1.json").write_text("{}")
    forked = await server.fork(run / "attempt-1.json", run / "aggregator.pid", 1)
    assert forked is not None
    async with asyncio.timeout(30):
        assert await forked.wait() == 1
    assert pid_file.attempt_of(run / "aggregator.pid") == 1 and not pid_file.is_alive(forked.pid)
    assert "ValidationError" in (run / "aggregator.log").read_text()
    process = await server.start()
    threads = len(list(Path(f"/proc/{process.pid}/task").iterdir()))
    assert threads <= 1 + (os.cpu_count() or 1), "a library that starts threads is loaded: they do not survive a fork"
    await server.close()


async def test_a_quiet_server_has_a_fork_ready_and_one_that_was_killed_is_not_missed(tmp_path: Path) -> None:
    server = ForkServer(tmp_path)
    process = await server.start()
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")

    async def spare(besides: int = 0) -> int:
        while not (ready := set(map(int, children.read_text().split())) - {besides}):  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        return ready.pop()

    async def forked(number: int) -> int:
        (tmp_path / "attempt.json").write_text("{}")
        child = await server.fork(tmp_path / "attempt.json", tmp_path / "aggregator.pid", number)
        assert child is not None and await child.wait() == 1
        return child.pid

    async with asyncio.timeout(60):
        ready = await spare()
        assert await forked(1) == ready
        killed = await spare(ready)
        os.kill(killed, signal.SIGKILL)
        while pid_file.is_alive(killed):  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        assert await forked(2) != killed
        last = await spare(killed)
        await server.close()
        while pid_file.is_alive(last):  # noqa: ASYNC110 - another process has no event to wait for
            await asyncio.sleep(0.01)


def launcher_in(folder: Path, *, warm_aggregator: bool = True) -> tuple[LocalLauncher, asyncio.Queue[tuple[int, int]]]:
    """And which attempts have ended, with what code."""
    ended: asyncio.Queue[tuple[int, int]] = asyncio.Queue()

    async def exited(how: Exit) -> None:
        await ended.put((how.attempt, how.code))

    fields = {"name": "c", "nats_url": "nats://127.0.0.1:1", "regions": ["eu"], "data_dir": folder, "http_port": 0}
    config = CoordinatorConfig.model_validate({**fields, "warm_aggregator": warm_aggregator})
    return LocalLauncher(folder / "runs", config, lambda *_: None, exited), ended


async def test_who_asked_and_is_gone_gets_no_aggregator(tmp_path: Path) -> None:
    server = ForkServer(tmp_path)
    process = await server.start()
    assert process.stdin is not None
    process.stdin.write(f'{{"config": "{tmp_path}/a.json", "note": "{tmp_path}/a.pid", "attempt": 1}}\n'.encode())
    await server.close()  # while it still loads its libraries
    assert process.returncode is not None and not (tmp_path / "a.pid").exists()


@pytest.mark.parametrize("ends_at_once", [False, True])
async def test_a_fork_whose_answer_was_lost_is_the_aggregator_and_no_second_one_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ends_at_once: bool
) -> None:
    launcher, ended = launcher_in(tmp_path)
    server = ForkServer(tmp_path)
    forked: list[int] = []

    async def unheard(config: Path, note: Path, attempt: int) -> None:
        child = await server.fork(config, note, attempt)
        assert child is not None
        forked.append(child.pid)
        while pid_file.find(note, attempt) is None:  # noqa: ASYNC110 - another process has no event to wait for
            await asyncio.sleep(0.01)

    monkeypatch.setattr(launcher._fork_server, "fork", unheard)
    if ends_at_once:
        spawn = launcher._spawn

        async def slow(file: Path, command: LaunchAggregator, folder: Path) -> asyncio.subprocess.Process:
            second = await spawn(file, command, folder)
            await launcher_module._end(forked[0])
            return second

        monkeypatch.setattr(launcher, "_spawn", slow)
    await launcher.launch(LaunchAggregator("run-1", 1, RunSpec(app=APP)), lambda: True)
    if not ends_at_once:
        assert pid_file.find(tmp_path / "runs/run-1/aggregator.pid", 1) == forked[0]
        assert ended.empty()
        await launcher.stop("run-1")
    assert await ended.get() == (1, GONE) and ended.empty()
    await launcher.close()
    await server.close()


async def test_a_launch_that_finds_no_files_is_tried_again_as_the_same_attempt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    launcher, ended = launcher_in(tmp_path, warm_aggregator=False)
    in_the_child = subprocess.SubprocessError("No space left on device: exception occurred in preexec_fn")
    failures = [OSError(errno.EMFILE, "Too many open files"), in_the_child]

    async def spawn(*_: object) -> asyncio.subprocess.Process:
        if failures:
            raise failures.pop()
        return await asyncio.create_subprocess_exec("true")

    monkeypatch.setattr(launcher, "_spawn", spawn)
    command = LaunchAggregator("run-1", 1, RunSpec(app=APP))
    for _ in range(2):
        with pytest.raises(TransientError, match=r"Too many|No space"):
            await launcher.launch(command, lambda: True)
    await launcher.launch(command, lambda: True)
    assert await ended.get() == (1, 0) and ended.empty()
    await launcher.close()
