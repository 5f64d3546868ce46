"""Event files: each round once, whatever fails in between, and nothing outside of their folder."""

from __future__ import annotations

from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fedtide.coordinator.adapters import tracking
from fedtide.coordinator.config import TrackingRules
from fedtide.coordinator.tracking import event_files
from fedtide.coordinator.tracking.record import RunRecord, TrackedRound
from fedtide.fabric.errors import ConfigError
from fedtide.fabric.plans.tracking import Tracking


def _record(rounds: int, **more: object) -> RunRecord:
    told = [
        TrackedRound(round=n, at=100.0 + n, metrics={"loss": 1 / n, "odd": float("nan")}) for n in range(1, rounds + 1)
    ]
    return RunRecord(run="run-1", experiment="tides", began=100.0, rounds=told, params={"lr": "0.1"}, **more)


def _steps(folder: Path) -> list[int]:
    read = EventAccumulator(str(folder))
    read.Reload()
    return [e.step for e in read.Scalars("loss")]


def test_rounds_are_written_once_and_artefacts_when_they_are_there(tmp_path: Path) -> None:
    folder = tmp_path / "tides" / "run-1"
    assert event_files.report(_record(2), tmp_path) is False
    assert event_files.report(_record(2), tmp_path) is False
    ended = {"ended": 110.0, "outcome": "completed"}
    assert event_files.report(_record(3, **ended), tmp_path) is True
    missing = {"model.onnx": tmp_path / "nowhere"}
    with pytest.raises(FileNotFoundError):
        event_files.report(_record(3, **ended, files=missing), tmp_path)
    (tmp_path / "m").write_text("model")
    assert event_files.report(_record(3, **ended, files={"model.onnx": tmp_path / "m"}), tmp_path) is False
    assert event_files.report(_record(3, **ended), tmp_path) is False
    assert _steps(folder) == [1, 2, 3] and (folder / "model.onnx").read_text() == "model"


@pytest.mark.parametrize("name", ["..", ".", "../../x", "/etc", "x" * 300, "a/b"])
def test_no_name_leaves_the_folder(tmp_path: Path, name: str) -> None:
    root = tmp_path / "root"
    event_files.report(_record(1).model_copy(update={"experiment": name}), root)
    assert [p.name for p in tmp_path.iterdir()] == ["root"]
    assert len(list(root.glob("*/run-1"))) == 1


def test_credentials_go_to_no_server_that_the_coordinator_does_not_name(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = Tracking(mlflow="http://a.example")
    tracking.check(asked, TrackingRules())
    with pytest.raises(ConfigError, match="none of this coordinator's"):
        tracking.check(asked, TrackingRules(mlflow=["http://b.example"]))
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "secret")
    with pytest.raises(ConfigError, match="does not say for which server"):
        tracking.check(asked, TrackingRules())
    tracking.check(asked, TrackingRules(mlflow=["http://a.example/"]))
