"""Unmodified Flower apps through the whole system: CLI, coordinator, aggregator, broker, agents, trainers."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import APPS
from tests.integration.installation import Installation


def test_flowers_own_fedavg_gives_exactly_the_mean_of_all_nodes(installation: Installation) -> None:
    view = installation.train(APPS / "mean", "--rounds", "3")
    assert view.state == "completed", view
    assert [r.round for r in view.rounds] == [0, 1, 2, 3]
    last = view.rounds[-1]
    assert last.metrics["mean"] == 7.5
    assert last.metrics["train_pid"] == 2.5
    assert view.participants == ["eu-1", "eu-2", "us-1", "us-2"]
    assert last.phases.keys() == {"train", "evaluate"}
    final = np.load(installation.out(view.run) / "final.npz")
    assert final["w"].dtype == np.float32
    assert np.array_equal(final["w"], np.full(100, 7.5))
    assert final["b"].shape == ()


def test_context_state_is_kept_per_node_and_run(installation: Installation) -> None:
    first, second = (installation.train(APPS / "mean", "--rounds", "3") for _ in range(2))
    for view in (first, second):
        assert [r.metrics.get("train_calls") for r in view.rounds] == [None, 1.0, 2.0, 3.0]


def test_large_updates_travel_as_blobs_and_leave_nothing_behind(installation: Installation) -> None:
    view = installation.train(APPS / "mean", "--set", "size=2000000", "--rounds", "1")
    assert view.rounds[1].bytes_up > 4 * 8_000_000
    final = np.load(installation.out(view.run) / "final.npz")
    assert np.array_equal(final["w"], np.full(2_000_000, 2.5, np.float32))
    for node in ("eu-1", "us-2"):
        outbox = installation.home / "nodes" / node / "outbox"
        assert list((outbox / "work").iterdir()) == []
        assert list((outbox / "pending").iterdir()) == []


def test_the_legacy_api_runs_and_reports_its_rounds(installation: Installation) -> None:
    view = installation.train(APPS / "legacy")
    assert view.state == "completed"
    assert [r.metrics for r in view.rounds] == [{"eval_loss": 12.0}, {"eval_loss": 24.0}]
    assert len(view.participants) == 4


def test_a_custom_main_with_push_and_pull_mods_and_every_value_kind(installation: Installation) -> None:
    view = installation.train(APPS / "pushpull", "--set", "greeting=1")
    answers = json.loads((installation.out(view.run) / "answers.json").read_text())
    assert len(answers) == 4
    expected = {
        "same": True,
        "many": [1, 2, 3],
        "nan": True,
        "kinds": ["int", "float", "bool"],
        "greeting": "1",
        "raw": [0, 255],
    }
    assert all(answer == expected for answer in answers)


def test_a_selector_limits_who_takes_part(installation: Installation) -> None:
    view = installation.train(APPS / "mean", "--rounds", "1", "--nodes", "region=us")
    assert view.participants == ["us-1", "us-2"]
    assert view.rounds[1].metrics["train_pid"] == 3.5


@pytest.mark.parametrize(
    ("mode", "category", "words"),
    [
        ("raise", "app_error", "ValueError: this node has no data"),
        ("exit", "app_error", "exit code 3"),
        ("import", "app_error", "a_module_that_is_not_there"),
        ("shape", "wrong_shape", "shape (9,), that of others is (10,)"),
        ("name", "wrong_shape", "only here: 'other'"),
        ("nan", "not_finite", "NaN or infinity"),
    ],
)
def test_one_bad_node_is_counted_with_its_reason_and_the_run_goes_on(
    installation: Installation, mode: str, category: str, words: str
) -> None:
    view = installation.train(APPS / "faulty", "--set", f"mode={mode}")
    assert view.state == "completed"
    train = view.rounds[0].phases["train"]
    assert list(train.refused) == ["eu-1"]
    assert train.refused["eu-1"].category == category
    assert words in train.refused["eu-1"].reason
    assert len(train.received) == 3
    final = np.load(installation.out(view.run) / "final.npz")
    assert np.array_equal(final["w"], np.ones(10, np.float32))


def test_a_node_that_hangs_is_given_up_at_the_deadline_and_works_again_afterwards(installation: Installation) -> None:
    view = installation.train(APPS / "faulty", "--set", "mode=hang", "--round-timeout", "4")
    assert view.rounds[0].phases["train"].refused["eu-1"].category == "timeout"
    view = installation.train(APPS / "faulty")
    assert len(view.participants) == 4


def test_a_run_in_which_every_update_is_refused_fails_and_says_so(installation: Installation) -> None:
    view = installation.train(APPS / "faulty", "--set", "mode=none", "--set", "size=10", "--rounds", "1")
    assert view.state == "completed"
    app = "import numpy as np\n"
    broken = installation.home / "broken"
    broken.mkdir(exist_ok=True)
    for file in (APPS / "faulty").glob("*.*"):
        text = file.read_text().replace("if context.node_config", "if 0 * context.node_config")
        (broken / file.name).write_text(app + text if file.suffix == ".py" else text)
    view = installation.train(broken, "--set", "mode=raise")
    assert view.state == "failed"
    assert "0 of 4 nodes gave an update that counts" in view.reason


def test_apps_that_cannot_run_are_refused_or_fail_with_the_reason(installation: Installation, tmp_path: Path) -> None:
    for name, server, words in (
        ("raises", "raise RuntimeError('at import')", "RuntimeError: at import"),
        ("needs", "import some_missing_library", "'some_missing_library', which is not installed"),
        ("wrong", "app = 3", "is not a flwr ServerApp"),
        ("empty", "", "app"),
    ):
        app = tmp_path / name
        app.mkdir()
        (app / "pyproject.toml").write_text((APPS / "mean" / "pyproject.toml").read_text().replace("mean_", f"{name}_"))
        (app / f"{name}_server.py").write_text(server)
        view = installation.train(app)
        assert view.state == "failed", view
        assert words in view.reason


def test_a_run_can_be_cancelled(installation: Installation) -> None:
    run = installation.json("run", "start", "--app", str(APPS / "faulty"), "--set", "mode=hang")["run"]
    assert installation.json("run", "cancel", run)["state"] == "cancelled"
    assert installation.run("run", "watch", run).returncode == 1
    assert installation.train(APPS / "faulty").state == "completed"


def test_the_log_tells_what_happened_to_a_run(installation: Installation) -> None:
    run = installation.train(APPS / "mean", "--rounds", "1").run
    kinds = [e.kind for e in installation.events(about=run)]
    assert kinds[:2] == ["run.requested", "run.aggregator_started"]
    assert kinds[-2:] == ["run.completed", "run.cleaned_up"]
    assert kinds.count("round.update_received") == 8
    (closed,) = installation.events(about=run, kind="round.c*", limit=1)
    assert (closed.data["round"], closed.what) == (1, "round 1 closed")
    listed = installation.run("events", "ls", "--about", run, "--kind", "round.closed", "--limit", "1").stdout
    assert listed.rstrip().endswith("round.closed              round 1 closed")
    assert "limit" in installation.run("events", "query", "--limit", "0").stderr
