"""The trainer process of nodes without torch: real processes, killed for real."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from fedtide.aggregation.training_export.exporter import export
from fedtide.edge_agent.training.onnx.checkpoint import Checkpoint
from fedtide.edge_agent.training.onnx.graph import replaced_specs
from fedtide.fabric.messages.scaffold import CHANGE, CONTROL
from fedtide.fabric.messages.tasks import Arrays, Values, WireMessage
from fedtide.fabric.strict import ConfigValues
from fedtide.fabric.tensors import codecs, training_bundle
from fedtide.fabric.tensors.frame import Tensor, decode, encode
from fedtide.fabric.tensors.training_bundle import TRAINING, TrainingBundle
from tests.integration.installation import until
from tests.training import jobs, models, reference
from tests.training.jobs import TrainerProcess

RUN: ConfigValues = {"local-epochs": 3, "batch-size": 8, "learning-rate": 0.05, "seed": 1}
SOURCE = """
import time
from pathlib import Path

import numpy as np

from fedtide.edge_agent.samples.source import Columns


class Slow(Columns):
    def read(self, indices):
        hold = Path(__file__).with_name("hold")
        if hold.exists() and len(indices) > 1:
            hold.write_text(hold.read_text() + ".")
            while len(hold.read_text()) > 5:
                time.sleep(0.01)
        return super().read(indices)


def open_it(node, run):
    stored = np.load(Path(__file__).with_name("data.npz"))
    return Slow({name: stored[name] for name in stored})
"""


@pytest.fixture
def app(tmp_path: Path, bundle: TrainingBundle) -> Path:
    """An app of a bundle and a data source, on a node where torch and flwr cannot be imported."""
    folder = tmp_path / "app"
    folder.mkdir()
    (folder / "pyproject.toml").write_text(
        '[project]\nname = "a"\n[tool.flwr.app.components]\nserverapp = "a:b"\nclientapp = "a:b"\n'
    )
    manifest = bundle.manifest.model_copy(update={"data": "node_samples:open_it"})
    (folder / TRAINING).write_bytes(training_bundle.pack(manifest, bundle.parts))
    (folder / "node_samples.py").write_text(SOURCE)
    plan = models.plan("mlp", rows=30)
    np.savez(folder / "data.npz", x=plan.inputs["x"].numpy(), label=plan.target.numpy())
    for name in ("torch", "flwr"):
        (tmp_path / "missing" / name).mkdir(parents=True)
        (tmp_path / "missing" / name / "__init__.py").write_text("raise ImportError('not on this node')")
    return folder


@pytest.fixture
def trainer(app: Path) -> Iterator[TrainerProcess]:
    started = TrainerProcess("fedtide.edge_agent.training.onnx", app.parent / "missing")
    yield started
    started.kill()


def asked(kind: str = "train", **config: float) -> WireMessage:
    state = reference.state(models.plan("mlp"))
    return jobs.message(kind, state, {"server-round": 1, "proximal-mu": 0.0, **config})


def arrays_of(message: WireMessage, name: str = "arrays") -> dict[str, Tensor]:
    part = (message.content or {})[name]
    assert isinstance(part, Arrays), message
    assert part.inline is not None
    return {t.name: t for t in decode(part.inline)}


def metrics_of(message: WireMessage) -> dict[str, object]:
    part = (message.content or {})["metrics"]
    assert isinstance(part, Values)
    return dict(part.values)


def test_a_killed_trainers_successor_goes_on_at_its_step(
    app: Path, trainer: TrainerProcess, tmp_path: Path, bundle: TrainingBundle
) -> None:
    task = jobs.task(asked(), RUN)
    whole = trainer.do(jobs.job(tmp_path / "whole", app, task, {}))
    (app / "hold").write_text("")
    half = jobs.job(tmp_path / "half", app, task, {})
    trainer.send(half)
    until(lambda: len((app / "hold").read_text()) > 5, "the sixth batch")
    trainer.kill()
    (app / "hold").unlink()
    found = Checkpoint.read(half.progress_file, 30, replaced_specs(bundle.manifest))
    assert found is not None
    assert found.steps == 5
    second = TrainerProcess("fedtide.edge_agent.training.onnx", app.parent / "missing")
    try:
        resumed = second.do(half)
    finally:
        second.kill()
    assert metrics_of(resumed) == metrics_of(whole)
    for name, tensor in arrays_of(whole).items():
        assert bytes(arrays_of(resumed)[name].data) == bytes(tensor.data)


def test_its_answers_are_those_of_a_client_app(app: Path, trainer: TrainerProcess, tmp_path: Path) -> None:
    trained = trainer.do(jobs.job(tmp_path / "a", app, jobs.task(asked(), RUN), {}))
    assert (trained.reply_to_message_id, trained.src_node_id, trained.message_type) == ("m1", 2, "train")
    assert list(arrays_of(trained)) == list(reference.state(models.plan("mlp")))
    assert metrics_of(trained).keys() == {"train_loss", "num-examples"}
    measured = trainer.do(jobs.job(tmp_path / "b", app, jobs.task(asked("evaluate"), RUN), {}))
    assert metrics_of(measured).keys() == {"loss", "accuracy", "num-examples"}
    refused = trainer.do(jobs.job(tmp_path / "c", app, jobs.task(asked("query"), RUN), {}))
    assert refused.error is not None
    assert "answers train and evaluate messages, not 'query'" in refused.error.reason


def test_what_a_lossy_codec_leaves_out_is_kept_for_the_next_update(
    app: Path, trainer: TrainerProcess, tmp_path: Path
) -> None:
    coded = trainer.do(jobs.job(tmp_path / "a", app, jobs.task(asked(), RUN, codec="topk:0.1"), {}))
    part = (coded.content or {})["arrays"]
    assert isinstance(part, Arrays)
    assert part.coded
    plain = arrays_of(trainer.do(jobs.job(tmp_path / "b", app, jobs.task(asked(), RUN), {})))
    base, kept = reference.state(models.plan("mlp")), decode((tmp_path / "a" / "out" / "state").read_bytes())
    found = {t.name: t.numpy() for t in (codecs.decode(c, base) for c in arrays_of(coded).values())}
    left = {t.name.removeprefix("fedtide.residual."): t.numpy() for t in kept}
    assert left.keys() == {"0.weight"}
    assert np.array_equal(found["0.bias"], plain["0.bias"].numpy())
    assert np.allclose(found["0.weight"] + left["0.weight"], plain["0.weight"].numpy(), atol=1e-6)


def test_a_strategys_proximal_term_pulls_back(app: Path, trainer: TrainerProcess, tmp_path: Path) -> None:
    def moved(mu: float) -> float:
        task = jobs.task(asked(**{"proximal-mu": mu}), RUN)
        went, came = (
            arrays_of(trainer.do(jobs.job(tmp_path / str(mu), app, task, {}))),
            reference.state(models.plan("mlp")),
        )
        return sum(float(np.square(went[k].numpy() - came[k].numpy()).sum()) for k in came)

    assert moved(5.0) < 0.5 * moved(0.0)


def test_control_variates_correct_the_steps_and_are_kept(app: Path, trainer: TrainerProcess, tmp_path: Path) -> None:
    plan = models.plan("linear")
    made = training_bundle.read(export(plan))
    manifest = made.manifest.model_copy(update={"data": "node_samples:open_it"})
    (app / TRAINING).write_bytes(training_bundle.pack(manifest, made.parts))
    came = {k: t.numpy() for k, t in reference.state(plan).items()}
    plain = jobs.message("train", reference.state(plan), {"server-round": 1})
    frame = b"".join(encode(Tensor.of(k, np.full_like(v, 0.01)) for k, v in came.items()))
    controlled = plain.model_copy(update={"content": {**(plain.content or {}), CONTROL: Arrays(inline=frame)}})
    answer = trainer.do(jobs.job(tmp_path / "a", app, jobs.task(controlled, RUN), {}))
    went = {k: t.numpy() for k, t in arrays_of(answer).items()}
    other = arrays_of(trainer.do(jobs.job(tmp_path / "b", app, jobs.task(plain, RUN), {})))
    assert not np.allclose(went["weight"], other["weight"].numpy(), atol=1e-4)
    assert metrics_of(answer)["num-steps"] == 12
    kept = {
        t.name.removeprefix("fedtide.scaffold."): t for t in decode((tmp_path / "a" / "out" / "state").read_bytes())
    }
    for name, change in arrays_of(answer, CHANGE).items():
        assert np.allclose(change.numpy(), (came[name] - went[name]) / (12 * 0.05) - 0.01, atol=1e-6), name
        assert np.array_equal(kept[name].numpy(), change.numpy())


def test_control_variates_need_a_bundle_that_has_them(app: Path, trainer: TrainerProcess, tmp_path: Path) -> None:
    message = asked()
    frame = b"".join(encode(reference.state(models.plan("mlp")).values()))
    message = message.model_copy(update={"content": {**(message.content or {}), CONTROL: Arrays(inline=frame)}})
    refused = trainer.do(jobs.job(tmp_path / "a", app, jobs.task(message, RUN), {}))
    assert refused.error is not None
    assert "Set `controls=True`" in refused.error.reason
