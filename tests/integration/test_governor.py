"""Training inside the node's limits: real processes, paused and ended for real."""

from __future__ import annotations

import asyncio
import os
import resource
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedtide.edge_agent.config import TrainingLimits
from fedtide.edge_agent.serving.serving import Served
from fedtide.edge_agent.tasks.governor import Governor, Latency, LimitExceeded
from tests.integration.installation import until
from tests.served import model


@pytest.fixture
async def busy() -> AsyncIterator[asyncio.subprocess.Process]:
    """A process in a group of its own that never rests."""
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", "while True: pass", start_new_session=True)
    yield process
    os.killpg(process.pid, signal.SIGKILL)
    await process.wait()


def _state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]


async def _until(holds: Any, what: str) -> None:
    await asyncio.to_thread(until, holds, what, 20)


def _governor(said: list[str], latency: Latency | None = None, **limits: Any) -> Governor:
    return Governor(TrainingLimits(**limits), "UTC", latency or Latency(), said.append)


async def test_a_training_process_with_a_share_of_the_cpu_is_stopped_and_goes_on_in_turn(
    busy: asyncio.subprocess.Process,
) -> None:
    watching = asyncio.create_task(_governor([], cpu_share=0.1).watch(busy.pid))
    for _ in range(2):
        await _until(lambda: _state(busy.pid) == "T", "it is stopped")
        await _until(lambda: _state(busy.pid) != "T", "it goes on")
    watching.cancel()
    await asyncio.gather(watching, return_exceptions=True)
    await _until(lambda: _state(busy.pid) != "T", "afterwards it runs")


async def test_training_pauses_while_requests_suffer_and_goes_on_when_they_do_not(
    busy: asyncio.subprocess.Process, tmp_path: Path
) -> None:
    said: list[str] = []
    latency, served = Latency(), model(tmp_path)

    def asked(seconds: float) -> None:
        for _ in range(60):
            latency.observe(Served(served, "", {}, {}, {"y": np.zeros(1)}, seconds))

    watching = asyncio.create_task(_governor(said, latency, inference_slo_ms=20).watch(busy.pid))
    asked(0.5)
    await _until(lambda: _state(busy.pid) == "T", "it is stopped")
    assert said == ["paused: requests take more than 20 ms"]
    asked(0.001)
    await _until(lambda: _state(busy.pid) != "T", "it goes on")
    assert said[-1] == "training"
    watching.cancel()
    await asyncio.gather(watching, return_exceptions=True)


async def test_a_task_that_trains_too_long_is_reported(busy: asyncio.subprocess.Process) -> None:
    with pytest.raises(LimitExceeded, match="as long as a task may"):
        await _governor([], task_s=0.2).watch(busy.pid)


async def test_training_does_not_begin_until_a_command_of_the_owner_allows_it(tmp_path: Path) -> None:
    said: list[str] = []
    allowed = tmp_path / "allowed"
    governor = _governor(said, allow_command=["test", "-e", str(allowed)], check_s=0.05)
    waiting = asyncio.create_task(governor.until_allowed())
    await _until(lambda: bool(said), "it says why")
    assert said == ["paused: test says no"]
    assert not waiting.done()
    allowed.touch()
    async with asyncio.timeout(20):
        await waiting
    missing = _governor(said := [], allow_command=["no-such-program"], check_s=0.05)
    waiting = asyncio.create_task(missing.until_allowed())
    await _until(lambda: bool(said), "what cannot be asked says no")
    waiting.cancel()


def test_the_kernel_refuses_memory_beyond_the_cap() -> None:
    most = 200 * 1024 * 1024
    code = "import numpy as np; np.ones(100_000_000)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_DATA, (most, most)),
        capture_output=True,
        text=True,
        check=False,
    )
    assert "MemoryError" in done.stderr
