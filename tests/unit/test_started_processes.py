"""Processes of Python find fedtide's modules and Python's own, whatever lies in the folder that somebody works in."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from fedtide.fabric.process.python import module_command
from tests.conftest import EXAMPLES

ROOMS = ("aggregation", "console", "coordinator", "edge_agent", "fabric")
FROM_AN_APPS_FOLDER = Path("console/demo/story.py")
"""The demo runs a module of the example in its folder, as its user would."""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Of an app whose modules have names of others."""
    for name in ("queue", "pydantic", "fedtide", "logging"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('a module of the app')")
    (tmp_path / "policy.toml").write_text("training = false\n")
    (tmp_path / "policy.toml").chmod(0o644)
    return tmp_path


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("node", "policy", "check", "policy.toml"), "training: no"),
        (("agent", "--config", "policy.toml"), "config.node"),
    ],
)
def test_a_command_does_not_take_an_apps_modules_for_others(folder: Path, words: tuple[str, ...], told: str) -> None:
    fedtide = Path(sys.executable).with_name("fedtide")
    done = subprocess.run([fedtide, *words], cwd=folder, capture_output=True, text=True, check=False)
    assert "a module of the app" not in done.stdout + done.stderr
    assert told in done.stdout + done.stderr


def test_a_module_that_is_run_so_is_found(folder: Path) -> None:
    done = subprocess.run(module_command("json.tool", "--help"), cwd=folder, capture_output=True, check=False)
    assert done.returncode == 0


def test_all_processes_of_ours_are_started_so() -> None:
    root = EXAMPLES.parent
    files = {file.relative_to(root) for room in ROOMS for file in (root / room).rglob("*.py")}
    others = {file for file in files if '"-m"' in (root / file).read_text()}
    assert others == {Path("fabric/process/python.py"), FROM_AN_APPS_FOLDER}
