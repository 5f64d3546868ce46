"""Apps that need packages, on an installation whose nodes may take wheels and ask no index."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import APPS
from tests.integration.installation import Installation
from tests.wheels import wheel


def _app(folder: Path, needs: str) -> Path:
    """The app `mean`, which now needs a package at both ends, and adds its major version instead of 1."""
    app = shutil.copytree(APPS / "mean", folder / f"needs-{needs[-3:]}", ignore=shutil.ignore_patterns("__pycache__"))
    file = app / "pyproject.toml"
    file.write_text(file.read_text().replace('["flwr", "numpy"]', f'["flwr", "numpy", "{needs}"]'))
    for end in ("server", "client"):
        code = app / f"mean_{end}.py"
        text = code.read_text().replace("import numpy as np", "import numpy as np\nimport tidetable")
        text = text.replace("+ 1\n    old", "+ int(tidetable.VERSION[0])\n    old")
        code.write_text(f"{text}\nprint('{end} has tidetable', tidetable.VERSION)\n")
    return app


AT_START = "sys.stderr.write('starts as ' + next(line for line in open('/proc/self/status') if 'Seccomp:' in line))"


@pytest.fixture
def wheels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for version in ("1.0", "2.0"):
        wheel(tmp_path / "wheels", "tidetable", version, at_start=AT_START)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "wheels"))
    return tmp_path / "wheels"


def test_a_run_whose_app_no_node_can_have_is_refused_at_once(installation: Installation, tmp_path: Path) -> None:
    done = installation.run("run", "start", "--app", str(_app(tmp_path, "tidetable==1.0")))
    assert done.returncode == 2
    assert "has no tidetable==1.0" in done.stderr and "--with-wheels" in done.stderr


@pytest.mark.slow
def test_wheels_travel_with_apps_and_versions_do_not_meet(
    installation: Installation, tmp_path: Path, wheels: Path
) -> None:
    results = []
    for version in ("1.0", "2.0"):
        app = _app(tmp_path, f"tidetable=={version}")
        view = installation.train(app, "--with-wheels", "--rounds", "1")
        assert view.state == "completed", view.reason
        results.append(np.load(installation.out(view.run) / "final.npz")["w"].mean())
        assert f"server has tidetable {version}" in installation.run("run", "logs", view.run).stdout
        there = installation.run("run", "logs", view.run, "--node", "eu-1").stdout
        assert f"client has tidetable {version}" in there
        assert "starts as Seccomp:\t2" in there, "what comes with a wheel runs where the app does"
    nodes = len(installation.nodes())
    assert results == pytest.approx([np.mean(range(nodes)) + 1, np.mean(range(nodes)) + 2])
    outside = (*installation.home.glob("nodes/*/trainer/trainer.log"), *installation.home.glob("logs/agent-*.log"))
    assert len(outside) == 2 * nodes
    assert not [file for file in outside if "starts as" in file.read_text()]
    plain = installation.train(APPS / "mean", "--rounds", "1")  # the trainer is again the agent's own
    assert plain.state == "completed"
    assert (installation.home / "environments").is_dir()


def test_wheels_that_are_nowhere_to_be_had_are_said_before_anything_is_sent(
    installation: Installation, tmp_path: Path, wheels: Path
) -> None:
    before = len(installation.runs())
    done = installation.run("run", "start", "--app", str(_app(tmp_path, "tidetable==3.0")), "--with-wheels")
    assert done.returncode == 1 and "no wheels for Python" in done.stderr and "tidetable==3.0" in done.stderr
    assert len(installation.runs()) == before
