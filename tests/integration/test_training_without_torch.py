"""Nodes that train from a bundle, through the whole system: alone, beside nodes with torch, and after being killed."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import numpy as np
import pytest

from tests.conftest import APPS
from tests.integration.conftest import bring_up
from tests.integration.installation import Installation, children, until

CLUSTERS = APPS / "clusters"
ONNX = "edge_agent.training"


@pytest.fixture(scope="module")
def without_torch(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Installation]:
    """Three nodes that train from bundles only."""
    there = bring_up(tmp_path_factory.mktemp("home"), "eu", 3, "--agent-set", 'train_runtime="onnx"')
    yield there
    there.run("down")


def trainers(there: Installation) -> list[str]:
    """What each node's trainer last ran."""
    logs = [there.home / "logs" / f"agent-{node}.log" for node in there.state["nodes"]]
    return [log.read_text().rpartition("runs=")[2].split()[0] for log in logs]


def use(there: Installation, node: str, runtime: str) -> None:
    """Change a node's runtime, as its owner would: the file, and a restart."""
    file = there.home / "config" / f"agent-{node}.json"
    pid = there.child(f"agent-{node}")
    file.write_text(file.read_text().replace('"train_runtime": "onnx"', f'"train_runtime": "{runtime}"'))
    os.kill(pid, signal.SIGKILL)
    until(lambda: children(there.state["pid"], file.name) not in ([], [pid]), "a restarted agent")


def final(there: Installation, run: str) -> dict[str, np.ndarray]:
    return dict(np.load(there.out(run) / "final.npz"))


def test_nodes_without_torch_and_with_it_end_at_the_same_model(without_torch: Installation) -> None:
    alone = without_torch.train(CLUSTERS, "--train", "onnx")
    assert alone["state"] == "completed", alone
    assert trainers(without_torch) == [ONNX] * 3
    assert alone["rounds"][-1]["metrics"]["eval_accuracy"] > 0.5
    use(without_torch, "eu-1", "flower")
    mixed = without_torch.train(CLUSTERS, "--train", "onnx")
    assert trainers(without_torch) == ["edge_agent.trainer_process", ONNX, ONNX]
    assert mixed["participants"] == ["eu-1", "eu-2", "eu-3"]
    of_mixed, of_alone = (final(without_torch, view["run"]) for view in (mixed, alone))
    for name, array in of_mixed.items():
        assert np.allclose(array, of_alone[name], rtol=0, atol=1e-6), name
    for key in ("train_train_loss", "eval_loss", "eval_accuracy"):
        values = [view["rounds"][-1]["metrics"][key] for view in (mixed, alone)]
        assert values[0] == pytest.approx(values[1], rel=1e-4), key


def test_an_app_without_a_bundle_is_refused_with_the_remedy(without_torch: Installation) -> None:
    view = without_torch.train(APPS / "mean", "--rounds", "1", "--nodes", "region=eu")
    refusals = str(view)
    assert "the app carries no training bundle" in refusals
    assert "--train onnx" in refusals
