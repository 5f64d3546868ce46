"""Runs reported as they go: to a real MLflow server, and to event files as TensorBoard reads them."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import onnx
import pytest
from mlflow import MlflowClient
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fedtide.console.embedded.plan import free_ports
from tests.conftest import APPS
from tests.integration.installation import Installation, until

EXPORT = """
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper


def export(arrays, context, onnx_path):
    factor = np.asarray(arrays["w"].numpy().mean(), np.float32)
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 3]) for name in "xy")
    nodes = [helper.make_node("Mul", ["x", "factor"], ["y"])]
    body = helper.make_graph(nodes, "scale", [x], [y], [numpy_helper.from_array(factor, "factor")])
    onnx.save(helper.make_model(body, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), onnx_path)
    sample = np.ones((1, 3), np.float32)
    return {"inputs": {"x": sample}, "outputs": {"y": sample * factor}}
"""


@dataclass
class Server:
    folder: Path
    port: int
    process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        command = [sys.executable, "-m", "mlflow", "server", "--port", str(self.port), "--workers", "1"]
        store, files = f"sqlite:///{self.folder}/runs.db", str(self.folder / "files")
        command += ["--backend-store-uri", store, "--artifacts-destination", files]
        environment = {**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true"}
        with (self.folder / "server.log").open("ab") as log:
            self.process = subprocess.Popen(
                command, cwd=self.folder, stdout=log, stderr=log, env=environment, start_new_session=True
            )

    def stop(self) -> None:
        if self.process is not None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, monkeypatch_module: pytest.MonkeyPatch) -> Iterator[Server]:
    there = Server(tmp_path_factory.mktemp("mlflow"), free_ports(1)[0])
    yield there
    there.stop()


@pytest.fixture(scope="module")
def monkeypatch_module() -> Iterator[pytest.MonkeyPatch]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
        yield patch


def _app(folder: Path, track: str) -> Path:
    app = shutil.copytree(APPS / "mean", folder / "tracked", ignore=shutil.ignore_patterns("__pycache__"))
    with (app / "pyproject.toml").open("a") as file:
        file.write('\n[tool.fedtide.app]\nmodel = "tracked"\nexport = "mean_export:export"\n')
        file.write(f"\n[tool.fedtide.track]\n{track}\n")
    (app / "mean_export.py").write_text(EXPORT)
    return app


@pytest.mark.slow
def test_a_run_is_in_mlflow_with_its_metrics_and_results_also_if_the_server_comes_late(
    installation: Installation, server: Server, tmp_path: Path
) -> None:
    app = _app(tmp_path, f'mlflow = "{server.url}"')
    view = installation.train(app, "--rounds", "3", "--track", "experiment=tides", "--set", "size=7")
    assert view.state == "completed", view.reason

    def is_told() -> bool:
        return any(view.run in each for each in installation.json("status")["warnings"])

    until(is_told, "a warning that the run is not reported")
    server.start()
    until(lambda: not is_told(), "the report", timeout_s=120)

    client = MlflowClient(server.url)
    experiment = client.get_experiment_by_name("tides")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    assert (run.info.status, run.info.run_name) == ("FINISHED", view.run)
    assert run.data.params["run_config.size"] == "7" and run.data.params["rounds"] == "3"
    assert run.data.tags["fedtide.version"] == "1" and run.data.tags["fedtide.run"] == view.run
    history = client.get_metric_history(run.info.run_id, "mean")
    shown = {r.round: r.metrics["mean"] for r in view.rounds}
    assert {m.step: m.value for m in history} == pytest.approx(shown) and len(history) == len(shown) == 4
    assert all(run.info.start_time <= m.timestamp <= run.info.end_time + 1000 for m in history)
    assert {f.path for f in client.list_artifacts(run.info.run_id)} == {"model.onnx", "lineage.json", "metrics.json"}
    model = onnx.load(client.download_artifacts(run.info.run_id, "model.onnx", str(tmp_path)))
    assert model.graph.name == "scale"

    again = installation.train(app, "--rounds", "1", "--track", "experiment=tides")
    until(lambda: len(client.search_runs([experiment.experiment_id], "status = 'FINISHED'")) == 2, "the second report")
    assert again.state == "completed"


@pytest.mark.slow
def test_a_failed_run_is_failed_there_too(installation: Installation, server: Server, tmp_path: Path) -> None:
    if server.process is None:
        server.start()
    app = _app(tmp_path, f'mlflow = "{server.url}"\nexperiment = "failing"')
    (app / "mean_server.py").write_text("raise KeyError('tide')\n")
    view = installation.train(app)
    assert view.state == "failed"
    client = MlflowClient(server.url)

    def failed() -> bool:
        experiment = client.get_experiment_by_name("failing")
        found = client.search_runs([experiment.experiment_id]) if experiment is not None else []
        return [r.info.status for r in found] == ["FAILED"] and "tide" in found[0].data.tags["fedtide.reason"]

    until(failed, "the report of the failure", timeout_s=120)


def test_event_files_hold_every_round(installation: Installation, tmp_path: Path) -> None:
    view = installation.train(_app(tmp_path, "tensorboard = true"), "--rounds", "2")
    folder = installation.home / "coordinator" / "tensorboard" / "mean" / view.run
    until((folder / "lineage.json").exists, "the report of the end")
    read = EventAccumulator(str(folder))
    read.Reload()
    assert {e.step: e.value for e in read.Scalars("mean")} == pytest.approx(
        {r.round: r.metrics["mean"] for r in view.rounds}
    )
    assert "round_seconds" in read.Tags()["scalars"]


@pytest.mark.slow
def test_one_more_round_of_a_model_is_reported_where_its_run_was(installation: Installation, tmp_path: Path) -> None:
    installation.train(_app(tmp_path, "tensorboard = true"), "--rounds", "1", "--model", "again")
    installation.until_events("release.published", about="again")
    more = installation.finish(installation.json("round", "trigger", "again")["run"])
    folder = installation.home / "coordinator" / "tensorboard" / "mean" / more.run
    until((folder / "lineage.json").exists, "its report")


@pytest.mark.parametrize(
    ("track", "says"),
    [
        ("mlflow=file:///etc", "http:// or https://"),
        ("wandb=x", "wandb"),
    ],
)
def test_a_tracker_that_does_not_exist_is_an_error_at_once(installation: Installation, track: str, says: str) -> None:
    done = installation.run("run", "start", "--app", str(APPS / "mean"), "--track", track)
    assert done.returncode == 2 and says in done.stderr
