"""Nodes that train from a bundle, through the whole system: alone, beside nodes with torch, and after being killed."""

from __future__ import annotations

import json
import math
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from fedtide.edge_agent.sandbox.levels import offered
from tests.conftest import APPS
from tests.hostile_node import APPS_USER
from tests.integration.conftest import bring_up
from tests.integration.installation import Installation, children, until

EXAMPLES = APPS.parents[1] / "examples"
CLUSTERS = APPS / "clusters"
EVALUATED = {"digits": 1000, "sensors": 1002}
"""Samples of the examples' test sets."""
ONNX = "fedtide.edge_agent.training.onnx"


@pytest.fixture(scope="module")
def without_torch(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Installation]:
    """Three nodes that train from bundles only."""
    there = bring_up(
        tmp_path_factory.mktemp("home"),
        "eu",
        3,
        "--agent-set",
        'train_runtime="onnx"',
        "--agent-set",
        "train_checkpoint_s=0",
    )
    if os.geteuid() == 0:
        change(there, "eu-2", apps_user=APPS_USER)
    yield there
    there.run("down")


def trainers(there: Installation) -> list[str]:
    """What each node's trainer last ran."""
    logs = [there.home / "logs" / f"agent-{node}.log" for node in there.state["nodes"]]
    return [log.read_text().rpartition("runs=")[2].split()[0] for log in logs]


def change(there: Installation, node: str, **settings: str) -> None:
    """Change a node's settings, as its owner would: the file, and a restart."""
    file = there.home / "config" / f"agent-{node}.json"
    pid = there.child(f"agent-{node}")
    file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))
    os.kill(pid, signal.SIGKILL)
    until(lambda: children(there.state["pid"], file.name) not in ([], [pid]), "a restarted agent")


def final(there: Installation, run: str) -> dict[str, np.ndarray]:
    return dict(np.load(there.out(run) / "final.npz"))


@pytest.mark.slow
def test_a_node_whose_trainer_is_killed_goes_on_where_it_was(without_torch: Installation) -> None:
    whole = without_torch.train(CLUSTERS, "--train", "onnx", "--rounds", "1")
    user = int(APPS_USER) if os.geteuid() == 0 else os.geteuid()
    assert without_torch.json("fleet", "show", "eu-2")["sandbox"] == ("user" if user == int(APPS_USER) else offered())
    # In the home that the runs of this app share on each node: elsewhere it could not answer.
    holds = [home / "hold" for home in (without_torch.home / "nodes").glob("*/homes/*")]
    assert len(holds) == 3
    for hold in holds:
        hold.touch()
    options = ("--train", "onnx", "--rounds", "1", "--set", "hold=~/hold")
    run = without_torch.json("run", "start", "--app", str(CLUSTERS), *options)["run"]
    until(lambda: all(hold.with_suffix(".reached").exists() for hold in holds), "trainers at their sixth batch")
    agent = without_torch.child("agent-eu-2")
    progress = without_torch.home / "nodes" / "eu-2" / "jobs" / run / "progress"
    until(lambda: any(progress.iterdir()), "progress of a node")
    (trainer,) = children(agent, ONNX)
    assert {file.stat().st_uid for file in progress.iterdir()} == {user}
    os.kill(trainer, signal.SIGKILL)
    until(lambda: children(agent, ONNX) not in ([], [trainer]), "another trainer")
    for hold in holds:
        hold.unlink()
    view = without_torch.finish(run)
    assert view.participants == ["eu-1", "eu-2", "eu-3"]
    assert "task.goes_on" in (without_torch.home / "logs" / "agent-eu-2.log").read_text()
    for name, array in final(without_torch, run).items():
        assert np.array_equal(array, final(without_torch, whole.run)[name]), name
    assert list(progress.iterdir()) == []


@pytest.mark.slow
def test_nodes_without_torch_and_with_it_end_at_the_same_model(without_torch: Installation) -> None:
    alone = without_torch.train(CLUSTERS, "--train", "onnx")
    assert alone.state == "completed", alone
    assert trainers(without_torch) == [ONNX] * 3
    assert alone.rounds[-1].metrics["eval_accuracy"] > 0.5
    change(without_torch, "eu-1", train_runtime="flower")
    mixed = without_torch.train(CLUSTERS, "--train", "onnx")
    assert trainers(without_torch) == ["fedtide.edge_agent.training.flower", ONNX, ONNX]
    assert mixed.participants == ["eu-1", "eu-2", "eu-3"]
    of_mixed, of_alone = (final(without_torch, view.run) for view in (mixed, alone))
    for name, array in of_mixed.items():
        assert np.allclose(array, of_alone[name], rtol=0, atol=1e-6), name
    for key in ("train_train_loss", "eval_loss", "eval_accuracy"):
        values = [view.rounds[-1].metrics[key] for view in (mixed, alone)]
        assert values[0] == pytest.approx(values[1], rel=1e-4), key


@pytest.mark.slow
def test_an_app_without_a_bundle_is_refused_with_the_remedy(without_torch: Installation) -> None:
    view = without_torch.train(APPS / "mean", "--rounds", "1", "--nodes", "region=eu")
    refusals = str(view)
    assert "the app carries no training bundle" in refusals
    assert "--train onnx" in refusals


@pytest.mark.slow
@pytest.mark.parametrize("example", ["digits", "sensors"])
def test_the_examples_are_as_accurate_in_every_fleet(tmp_path: Path, example: str) -> None:
    there = bring_up(tmp_path, "eu", 4, "--agent-set", 'train_runtime="onnx"')
    reached = {}
    try:
        for fleet, nodes in (("onnx", []), ("mixed", ["eu-1", "eu-2"]), ("torch", ["eu-3", "eu-4"])):
            for node in nodes:
                change(there, node, train_runtime="flower")
            view = there.train(EXAMPLES / example, "--train", "onnx", "--rounds", "6")
            assert view.participants == ["eu-1", "eu-2", "eu-3", "eu-4"]
            reached[fleet] = view.rounds[-1].metrics["accuracy"]
    finally:
        there.run("down")
    print(example, reached)
    # One seed on so many samples says no more than this: three standard errors of a difference of two proportions.
    tolerance = 3 * math.sqrt(2 * reached["torch"] * (1 - reached["torch"]) / EVALUATED[example])
    assert abs(reached["onnx"] - reached["torch"]) <= tolerance, reached
    assert abs(reached["mixed"] - reached["torch"]) <= tolerance, reached
