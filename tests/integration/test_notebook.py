"""The notebook of the examples, run as it stands, and what the client says of mistakes."""

from __future__ import annotations

from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import nbformat
import pandas as pd
import pytest
from nbclient import NotebookClient

import fedtide
from fedtide.console.client import ApiError
from fedtide.console.notebook import RunDidNotComplete
from fedtide.fabric.errors import ConfigError
from tests.conftest import APPS
from tests.integration.conftest import bring_up
from tests.integration.installation import Installation

pytestmark = pytest.mark.slow  # an installation of its own, and a kernel
NOTEBOOK = Path(__file__).parents[2] / "examples" / "notebook" / "first_run.ipynb"


@pytest.fixture(scope="module")
def there(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Installation]:
    found = bring_up(tmp_path_factory.mktemp("notebook"), "eu,us", 1)
    yield found
    found.run("down")


@pytest.fixture
def client(there: Installation, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("FEDTIDE_HOME", str(there.home))
    return fedtide.Client()


def test_the_example_notebook_runs_from_the_first_cell_to_the_last(
    there: Installation, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEDTIDE_HOME", str(there.home))
    book = nbformat.read(NOTEBOOK, as_version=4)
    assert all(not cell.get("outputs") for cell in book.cells), "it is kept without outputs"
    NotebookClient(book, timeout=180, resources={"metadata": {"path": str(NOTEBOOK.parent)}}).execute()
    said = "\n".join(str(cell.get("outputs", "")) for cell in book.cells)
    assert "round 3: " in said and "completed" in said
    assert "image/png" in said


def test_frames_have_what_the_api_says(client: Any, there: Installation) -> None:
    assert set(client.nodes().index) == {"eu-1", "us-1"}
    runs = client.runs(state="completed")
    run = client.run(runs.index[0])
    assert list(run.rounds.index) == [r.round for r in there.show(run.name).rounds]
    assert run.rounds["bytes_up"].sum() > 0
    cost = client.cost("region,phase")
    assert cost.index.names == ["region", "phase"]
    assert sum(cost["cost"]) == cost.attrs["total"]
    assert isinstance(cost.attrs["total"], Decimal)
    assert isinstance(client.runs(model="none"), pd.DataFrame)
    assert client.runs(model="none").empty
    assert "<table" in run._repr_html_()
    assert client.plan("sensors", regions=["eu"]).nodes == 1
    assert client.trigger("com.example.nothing", score=1) == {}


def test_mistakes_are_said_with_what_to_do(client: Any) -> None:
    with pytest.raises(ApiError, match="there is no run"):
        client.run("run-none")
    with pytest.raises(ConfigError, match="declares no such config key"):
        client.start(APPS / "mean", config={"planet": 1})
    with pytest.raises(ConfigError, match="no such field"):
        client.start(APPS / "mean", planet=1)
    with pytest.raises(ConfigError, match="has no 'planet'"):
        client.run(client.runs().index[0]).plot("planet")
    with pytest.raises(AttributeError, match="no attribute"):
        fedtide.Planet  # noqa: B018


def test_a_run_that_does_not_complete_raises_with_its_reason(client: Any) -> None:
    run = client.start(APPS / "mean", rounds=500)
    run.act("cancel")
    with pytest.raises(RunDidNotComplete, match=f"{run.name} did not complete: .*asked by a person"):
        run.watch()
    assert run.state == "cancelled"
