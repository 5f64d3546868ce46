"""`fedtide app check`: an app is tried here, with an installation of its own, before a fleet gets it."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import APPS
from tests.integration.installation import until


def _check(app: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "fedtide.console.cli", "app", "check", str(app), *options]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("FEDTIDE_")}
    return subprocess.run(command, capture_output=True, text=True, timeout=180, check=False, env=environment)


def _changed(folder: Path, file: str, old: str, new: str) -> Path:
    app = shutil.copytree(APPS / "mean", folder / "app", ignore=shutil.ignore_patterns("__pycache__"))
    text = (app / file).read_text()
    assert old in text
    (app / file).write_text(text.replace(old, new))
    return app


@pytest.mark.slow
def test_a_broken_app_is_shown_with_its_line_and_what_it_printed(tmp_path: Path) -> None:
    app = _changed(tmp_path, "mean_client.py", 'print("a ClientApp may print")', 'print("before"); {}["rows"]')
    (app / ".env").write_text("SECRET=1")
    done = _check(app, "--folder", str(tmp_path / "trial"))
    assert done.returncode == 1, done.stderr
    line = next(n for n, text in enumerate((app / "mean_client.py").read_text().splitlines(), 1) if "rows" in text)
    assert f"PROBLEM train on check-1: KeyError: 'rows' (mean_client.py:{line} in train)" in done.stdout
    assert "check-2 |  before" in done.stdout and "[ROUND 1/1]" in done.stdout
    assert "left out of the bundle: .env (hidden)" in done.stderr
    assert (tmp_path / "trial" / "logs").is_dir() and not (tmp_path / "trial" / "up.json").exists()


@pytest.mark.slow
def test_a_good_app_runs_for_as_many_rounds_as_asked(tmp_path: Path) -> None:
    done = _check(APPS / "mean", "--rounds", "2", "--nodes", "3", "--set", "size=5")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "[ROUND 2/2]" in done.stdout and "Sampled 3 nodes (out of 3)" in done.stdout
    assert "mean runs here" in done.stdout


@pytest.mark.slow
def test_an_app_that_waits_for_more_nodes_says_so(tmp_path: Path) -> None:
    app = _changed(tmp_path, "mean_server.py", "fraction_evaluate=1.0", "fraction_evaluate=1.0, min_available_nodes=5")
    done = _check(app, "--timeout", "8")
    assert done.returncode == 1
    assert "5" in done.stdout.partition("PROBLEM")[2] and "nodes" in done.stdout.partition("PROBLEM")[2]


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_a_check_that_is_ended_leaves_nothing(tmp_path: Path, how: signal.Signals) -> None:
    app = _changed(tmp_path, "mean_client.py", "time.sleep(float(", "time.sleep(1000 + float(")
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    command = [sys.executable, "-m", "fedtide.console.cli", "app", "check", str(app)]
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as process:
        until(lambda: bool(list(tmp_path.glob("fedtide-check-*/nodes/*/app-logs/*"))), "training")
        process.send_signal(how)
        assert process.wait(30) == 130
    assert list(tmp_path.glob("fedtide-check-*")) == []


@pytest.mark.parametrize(
    ("app", "options", "says"),
    [("nowhere", (), "no such app directory"), ("mean", ("--set", "sise=5"), "declares no such config key")],
)
def test_what_cannot_be_right_is_said_before_anything_starts(app: str, options: tuple[str, ...], says: str) -> None:
    done = _check(APPS / app, *options)
    assert done.returncode == 2 and says in done.stderr
