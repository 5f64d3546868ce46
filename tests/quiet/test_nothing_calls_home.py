"""The whole demo, with a home folder of its own and a guard in every Python process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

GUARD = Path(__file__).parent / "guard"


@pytest.mark.slow  # the demo takes a minute
@pytest.mark.parametrize("train", ["flower", "onnx"])
def test_the_demo_writes_outside_its_folder_nothing_and_calls_nobody(tmp_path: Path, train: str) -> None:
    home, log = tmp_path / "home", tmp_path / "log"
    home.mkdir()
    env = {**os.environ, "HOME": str(home), "QUIET_LOG": str(log), "PYTHONPATH": str(GUARD), "TMPDIR": str(tmp_path)}
    for name in (
        "XDG_CACHE_HOME",
        "XDG_CONFIG_HOME",
        "FEDTIDE_HOME",
        "ORT_DISABLE_TELEMETRY",
        "FLWR_TELEMETRY_ENABLED",
    ):
        env.pop(name, None)
    command = [sys.executable, "-m", "fedtide.console.cli", "demo", "--train", train]
    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [str(f) for f in home.rglob("*") if f.is_file()] == []
    assert not log.exists(), log.read_text()


def test_the_guard_notices_a_name_and_an_address(tmp_path: Path) -> None:
    tries = "import socket\ntry: socket.create_connection(('example.invalid', 80), 1)\nexcept OSError: pass\n"
    tries += "s = socket.socket()\ns.settimeout(0.1)\ntry: s.connect(('192.0.2.1', 9))\nexcept OSError: pass\n"
    env = {**os.environ, "QUIET_LOG": str(tmp_path / "log"), "PYTHONPATH": str(GUARD)}
    subprocess.run([sys.executable, "-c", tries], env=env, check=True, timeout=60)
    said = (tmp_path / "log").read_text()
    assert "example.invalid" in said and "192.0.2.1" in said


def test_libraries_are_told_before_they_are_loaded() -> None:
    names = ("ORT_DISABLE_TELEMETRY", "FLWR_TELEMETRY_ENABLED", "MLFLOW_DISABLE_TELEMETRY")
    code = f"import fedtide, os; print(*[os.environ[name] for name in {names}])"
    env = {k: v for k, v in os.environ.items() if "TELEMETRY" not in k}
    told = subprocess.run([sys.executable, "-c", code], env=env, check=True, capture_output=True, text=True, timeout=60)
    assert told.stdout.split() == ["1", "0", "true"]
