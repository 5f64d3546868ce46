"""The wheel, in an environment of its own beside packages and apps with the names that fedtide's directories have."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import APPS

ROOT = Path(__file__).parents[2]
SOURCES = ("fedtide", "fabric", "aggregation", "edge_agent", "coordinator", "console", "pyproject.toml", "README.md")


@pytest.fixture(scope="module")
def there(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh environment with the wheel and PyPI's `fabric`; what both need comes from the one that tests run in."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in (*SOURCES, "LICENSE"):
        here = ROOT / name
        if here.is_dir():
            shutil.copytree(here, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(here, source / name)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    build = ["wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder), str(source)]
    subprocess.run([*pip, *build], check=True)
    (wheel,) = folder.glob("fedtide-*.whl")
    environment = folder / "env"
    venv.create(environment, with_pip=False)
    (packages,) = environment.glob("lib/python*/site-packages")
    install = ["--python", str(environment / "bin" / "python"), "install", "--no-deps", str(wheel), "fabric>=3,<4"]
    subprocess.run([*pip, *install], check=True)
    # A plain path line: the editable install of the checkout, which hooks into imports there, is not read.
    (packages / "zz-libraries.pth").write_text(f"{sysconfig.get_path('purelib')}\n")
    return environment


@pytest.mark.slow
def test_the_wheel_runs_a_round_beside_its_namesakes(there: Path, tmp_path: Path) -> None:
    home = tmp_path / "home"
    variables = {k: v for k, v in os.environ.items() if not k.startswith(("FEDTIDE_", "PYTHONPATH"))}
    variables |= {"FEDTIDE_HOME": str(home)}

    def fedtide(*arguments: str) -> str:
        command = [str(there / "bin" / "fedtide"), *arguments]
        done = subprocess.run(command, cwd=tmp_path, env=variables, capture_output=True, text=True, timeout=90)
        assert done.returncode == 0, done.stderr
        return done.stdout

    where = "from importlib.util import find_spec as f; print(f('fabric').origin, f('fedtide.fabric').origin)"
    python = [str(there / "bin" / "python"), "-c", where]
    found = subprocess.run(python, cwd=tmp_path, env=variables, capture_output=True, text=True, check=True)
    theirs, inside = found.stdout.split()
    assert Path(theirs).is_relative_to(there)
    assert Path(inside).is_relative_to(there), "the wheel is what runs, not the checkout"
    fedtide("up", "-d", "--regions", "eu", "--nodes-per-region", "2")
    try:
        run = json.loads(fedtide("run", "start", "--app", str(APPS / "namesake"), "-o", "json"))["run"]
        fedtide("run", "watch", run)
        final = np.load(home / "coordinator" / "runs" / run / "out" / "final.npz")
        assert final["w"].tolist() == [4.0, 4.0, 4.0]
        assert "trained on 2 of 2 nodes" in fedtide("try"), "its app is in the wheel"
    finally:
        fedtide("down")
