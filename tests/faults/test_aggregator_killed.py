"""SIGKILL of the aggregator: the same round goes on, nobody trains again, the model is the same to the byte."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedtide.fabric.messages.views import RunView
from tests.conftest import APPS
from tests.integration.conftest import bring_up
from tests.integration.installation import Installation, until

SLOW = """    import time

    time.sleep(1.0)
    content = RecordDict("""


@pytest.fixture(scope="module")
def there(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Installation]:
    """Four nodes, of which the first is slow."""
    installation = bring_up(tmp_path_factory.mktemp("killed"), "eu,us", 2)
    yield installation
    installation.run("down")


def _start(there: Installation, *options: str) -> str:
    arguments = ["run", "start", "--app", str(APPS / "mean"), "--rounds", "3", "--set", "delay=1.5", *options]
    run: str = there.json(*arguments)["run"]
    return run


def _kill_in(there: Installation, run: str, round_: int, received: int) -> None:
    """SIGKILL the run's aggregator once `received` updates of the round have arrived."""

    def far_enough() -> bool:
        rounds = {r.round: r for r in there.show(run).rounds}
        phases = rounds[round_].phases if round_ in rounds else {}
        asked = phases.get("train") or next(
            iter(phases.values()), None
        )  # an app of its own kind names its phases itself
        return asked is not None and len(asked.received) >= received

    until(far_enough, f"update {received} of round {round_}")
    note = there.home / "coordinator" / "runs" / run / "aggregator.pid"
    os.kill(json.loads(note.read_text())["pid"], signal.SIGKILL)


def _final(there: Installation, run: str) -> bytes:
    return (there.out(run) / "final.npz").read_bytes()


def _trainings(view: RunView) -> list[float]:
    """How often each node had trained in this run, on average, by round."""
    return [r.metrics["train_calls"] for r in view.rounds if r.round]


@pytest.mark.parametrize("strategy", ["FedAvg", pytest.param("FedAdam", marks=pytest.mark.slow)])
def test_a_killed_aggregator_resumes_its_round_with_the_delivered_updates(there: Installation, strategy: str) -> None:
    options = ("--set", f"strategy={strategy}", "--set", "size=100000")
    undisturbed = there.finish(_start(there, *options))
    run = _start(there, *options)
    _kill_in(there, run, 2, 3)
    view = there.finish(run)
    assert view.state == "completed", view
    assert view.attempt == 2
    assert _trainings(view) == _trainings(undisturbed) == [1.0, 2.0, 3.0]
    assert [r.metrics for r in view.rounds] == [r.metrics for r in undisturbed.rounds]
    assert _final(there, run) == _final(there, undisturbed.run)


@pytest.mark.slow
def test_a_run_survives_a_kill_in_every_round(there: Installation) -> None:
    run = _start(there)
    for number in (1, 2, 3):
        _kill_in(there, run, number, 2)
        until(lambda n=number: there.show(run).attempt == n + 1, "the next attempt")
    view = there.finish(run)
    assert view.state == "completed", view
    assert _trainings(view) == [1.0, 2.0, 3.0]


def test_a_resumed_round_asks_the_nodes_that_were_sampled_before(there: Installation) -> None:
    """Were others asked, the round would count more than two nodes."""
    run = _start(there, "--set", "fraction=0.5", "--set", "everyone=true")
    until(lambda: len(there.show(run).rounds) >= 2, "the first round")
    _kill_in(there, run, 1, 0)
    view = there.finish(run)
    assert view.state == "completed"
    assert [r.phases["train"].asked for r in view.rounds[1:]] == [2, 2, 2]
    assert view.attempt == 2


@pytest.mark.slow
def test_an_app_without_strategy_start_begins_again_and_says_so(there: Installation, tmp_path: Path) -> None:
    app = tmp_path / "own"
    app.mkdir()
    for file in (APPS / "pushpull").glob("*.*"):
        (app / file.name).write_text(file.read_text().replace("    content = RecordDict(", SLOW, 1))
    run = there.json("run", "start", "--app", str(app))["run"]
    until(lambda: bool(there.show(run).rounds), "the first messages")
    _kill_in(there, run, 0, 0)
    until(lambda: "started again from its first round" in there.show(run).reason, "the word")
    assert there.finish(run).state == "completed"
