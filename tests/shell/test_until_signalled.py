"""Programs end when they are asked to, also while what they need is not there."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from fedtide.fabric.nats.broker import Broker
from fedtide.fabric.process.until_signalled import ALIVE, until_signalled

NOWHERE = "nats://127.0.0.1:1"
PROGRAMS = {
    "fedtide.edge_agent.drift.collector": {"regions": [{"region": "eu", "nats_url": NOWHERE}]},
    "fedtide.aggregation.folding.fold_worker": {"name": "eu", "region": "eu", "nats_url": NOWHERE},
}


def _ignore() -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


@pytest.mark.parametrize("module", list(PROGRAMS))
def test_a_program_that_waits_for_its_server_ends_at_once_and_well(tmp_path: Path, module: str) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps(PROGRAMS[module]))
    command = [sys.executable, "-m", module, str(file)]
    # As in a container: nothing ends the process but what it does about the signal itself.
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, preexec_fn=_ignore)
    with process:
        assert process.stderr is not None
        while "broker.error" not in process.stderr.readline():
            assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
        assert "Traceback" not in process.stderr.read()


async def test_what_is_cancelled_while_it_first_connects_is_cancelled_and_nothing_else() -> None:
    connecting = asyncio.create_task(Broker.connect(NOWHERE, "test", wait_s=None))
    await asyncio.wait({connecting}, timeout=0.3)
    connecting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await connecting


async def test_work_that_ends_by_itself_was_not_signalled() -> None:
    assert await until_signalled(asyncio.sleep(0)) is False


async def test_a_file_is_touched_while_the_loop_turns_and_no_longer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "alive"
    monkeypatch.setenv(ALIVE, str(file))
    monkeypatch.setattr("fedtide.fabric.process.until_signalled.TOUCH_S", 0.01)

    async def work() -> None:
        while not file.exists():  # noqa: ASYNC110 - a file sets no event
            await asyncio.sleep(0.01)
        file.unlink()
        while not file.exists():  # noqa: ASYNC110
            await asyncio.sleep(0.01)

    await until_signalled(work())
    file.unlink()
    await asyncio.sleep(0.1)
    assert not file.exists()
