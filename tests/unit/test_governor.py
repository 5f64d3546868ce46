"""Training inside the node's limits: real processes, paused and ended for real."""

from __future__ import annotations

import asyncio
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedtide.edge_agent.config import TrainingLimits
from fedtide.edge_agent.serving.serving import Served
from fedtide.edge_agent.tasks import sensors
from fedtide.edge_agent.tasks.governor import Governor, Latency, LimitExceeded
from fedtide.fabric.plans.windows import Window, is_open, opens_at
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


async def test_a_training_process_gets_its_share_of_the_cpu_and_no_more(busy: asyncio.subprocess.Process) -> None:
    share = 0.1
    watching = asyncio.create_task(_governor([], cpu_share=share).watch(busy.pid))
    began, used = time.monotonic(), sensors.cpu_seconds(busy.pid)
    await asyncio.sleep(3)  # what is measured is time itself
    spent = (sensors.cpu_seconds(busy.pid) - used) / (time.monotonic() - began) / (os.cpu_count() or 1)
    watching.cancel()
    await asyncio.gather(watching, return_exceptions=True)
    assert 0 < spent < 2 * share
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


def test_temperature_and_battery_are_read_where_linux_has_them(tmp_path: Path) -> None:
    def write(path: str, text: str) -> None:
        file = tmp_path / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{text}\n")

    assert sensors.hottest_celsius(tmp_path) is None
    assert sensors.battery(tmp_path) is None
    write("thermal_zone0/temp", "41000")
    write("thermal_zone1/temp", "55500")
    write("BAT0/type", "Battery")
    write("BAT0/capacity", "37")
    write("BAT0/status", "Discharging")
    write("AC/type", "Mains")
    assert sensors.hottest_celsius(tmp_path) == 55.5
    assert sensors.battery(tmp_path) == sensors.Battery(0.37, False)
    write("BAT0/status", "Charging")
    assert sensors.battery(tmp_path) == sensors.Battery(0.37, True)


# Windows


def _at(text: str) -> datetime:
    return datetime.fromisoformat(text).replace(tzinfo=UTC)


def test_a_window_over_midnight_belongs_to_the_day_on_which_it_starts() -> None:
    window = Window(start="22:00", end="04:00", days=["fri"])
    assert is_open(window, _at("2026-11-27 23:00"))  # a Friday
    assert is_open(window, _at("2026-11-28 03:59"))
    assert not is_open(window, _at("2026-11-28 04:00"))
    assert not is_open(window, _at("2026-11-27 03:00"))
    assert opens_at(window, _at("2026-11-28 05:00")) == _at("2026-12-04 22:00")


def test_a_window_follows_the_clock_of_its_zone_also_when_that_is_changed() -> None:
    window = Window(start="02:30", end="05:00", timezone="Europe/Berlin")
    assert opens_at(window, _at("2026-07-01 12:00")) == _at("2026-07-02 00:30")
    assert opens_at(window, _at("2026-12-01 12:00")) == _at("2026-12-02 01:30")
    assert is_open(Window(start="09:00", end="17:00"), _at("2026-01-05 00:30"), "Asia/Tokyo")
