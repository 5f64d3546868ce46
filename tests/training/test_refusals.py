"""What does not fit is refused, each with its own error."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fedtide.aggregation.training_export.exporter import export
from fedtide.aggregation.training_export.optimisers import Sgd
from fedtide.aggregation.training_export.plan import TrainingPlan
from fedtide.aggregation.training_export.proof import TrainingDiffers, prove
from fedtide.aggregation.training_export.tracing import NotExportable
from fedtide.edge_agent.samples.source import Columns
from fedtide.edge_agent.tasks import trainer
from fedtide.edge_agent.training.onnx.batches import Batches
from fedtide.edge_agent.training.onnx.errors import GraphMismatch, WrongData, WrongModel, WrongTask
from fedtide.edge_agent.training.onnx.graph import TrainingGraph
from fedtide.edge_agent.training.onnx.task import check_config, model_values, params_of
from fedtide.fabric.errors import CapabilityMissing, ConfigError, MalformedMessage
from fedtide.fabric.tensors import training_bundle
from fedtide.fabric.tensors.training_bundle import TRAIN, TRAINING, TrainingBundle, WrongDigest
from tests.training import models, reference


def test_a_part_with_another_digest(bundle: TrainingBundle) -> None:
    packed = training_bundle.pack(bundle.manifest, bundle.parts)
    assert training_bundle.read(packed).manifest == bundle.manifest
    at = packed.index(bundle.parts[TRAIN]) + 100
    with pytest.raises(WrongDigest, match="Export the app's training again"):
        training_bundle.read(packed[:at] + bytes([packed[at] ^ 1]) + packed[at + 1 :])
    changed = training_bundle.pack(bundle.manifest, {**bundle.parts, TRAIN: b"other"})
    digest = bundle.manifest.digests[TRAIN].encode()
    forged = changed.replace(training_bundle.read(changed).manifest.digests[TRAIN].encode(), digest)
    with pytest.raises(WrongDigest):
        training_bundle.read(forged)


def test_what_is_no_bundle() -> None:
    with pytest.raises(MalformedMessage, match="no training bundle"):
        training_bundle.read(b"PK nothing of the kind")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda m: {"inputs": [m.inputs[0].model_copy(update={"shape": (1, 13)})]}, "its manifest says F32"),
        (lambda m: {"slots": ["momentum", "second"]}, "does not take"),
        (lambda m: {"slots": []}, "knows nothing"),
        (lambda m: {"frozen": m.parameters[:1], "parameters": m.parameters[1:]}, "knows nothing"),
    ],
)
def test_a_graph_whose_inputs_are_others(bundle: TrainingBundle, change: Callable[[Any], Any], said: str) -> None:
    manifest = bundle.manifest.model_copy(update=change(bundle.manifest))
    with pytest.raises(GraphMismatch, match=said):
        TrainingGraph(TrainingBundle(manifest, bundle.parts), {}, 1)


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        ({"x": np.zeros((3, 11), np.float32), "label": np.zeros(3, np.int64)}, r"shape \(11,\).*made for \(12,\)"),
        ({"x": np.zeros((3, 12), np.complex64), "label": np.zeros(3, np.int64)}, "has the type complex64"),
        ({"x": np.zeros((3, 12), np.float32), "label": np.zeros(3, np.float32)}, "has the type float32"),
        ({"x": np.zeros((3, 12), np.float32), "label": np.array([-1, 0, 1])}, "label -1 to a model of 5 classes"),
        ({"y": np.zeros((3, 12), np.float32), "label": np.zeros(3, np.int64)}, "gives no column 'x'"),
        ({"x": np.zeros((0, 12), np.float32), "label": np.zeros(0, np.int64)}, "is empty"),
    ],
)
def test_a_data_source_that_does_not_fit(bundle: TrainingBundle, columns: dict[str, Any], said: str) -> None:
    with pytest.raises(WrongData, match=said):
        Batches(Columns(columns), bundle.manifest)


def test_a_message_with_another_model(bundle: TrainingBundle) -> None:
    came = reference.state(models.plan("mlp"))
    with pytest.raises(WrongModel, match=r"no parameter '0\.bias'"):
        model_values(bundle, {k: t for k, t in came.items() if k != "0.bias"})
    with pytest.raises(WrongModel, match="the bundle trains"):
        model_values(bundle, {**came, "0.bias": came["2.bias"]})


def test_a_run_that_sets_what_is_in_the_graph(bundle: TrainingBundle) -> None:
    check_config(bundle.manifest, {"momentum": 0.9, "learning-rate": 1.0})
    with pytest.raises(WrongTask, match=r"made with momentum=0\.9, the run says 0\.5.*--train onnx"):
        check_config(bundle.manifest, {"momentum": 0.5})
    with pytest.raises(WrongTask, match="has a number 'local-epochs'"):
        params_of(bundle.manifest, {}, {})


def test_a_graph_that_learns_something_else_is_not_published(bundle: TrainingBundle) -> None:
    plan = models.plan("mlp")
    other = replace(plan, optimiser=Sgd(momentum=0.8, weight_decay=1e-3))
    with pytest.raises(TrainingDiffers, match="differs from torch"):
        prove(other, bundle.parts, [])


def test_training_that_diverges_proves_nothing(bundle: TrainingBundle) -> None:
    plan = models.plan("mlp")
    with pytest.raises(ConfigError, match="is no finite number"):
        prove(replace(plan, inputs={"x": plan.inputs["x"] * 1e30}), bundle.parts, [])


def test_a_model_with_an_unknown_operator_names_it() -> None:
    class Strange(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.special.bessel_j0(self.linear(x)).detach() + self.linear(x)

    plan = TrainingPlan(Strange(), {"x": torch.rand(2, 3)}, torch.tensor([0, 1]), nn.functional.cross_entropy, Sgd())
    with pytest.raises(NotExportable, match="bessel_j0"):
        export(plan)


def test_plans_that_do_not_fit_together() -> None:
    one = TrainingPlan(nn.Linear(3, 2), {"x": torch.rand(1, 3)}, torch.tensor([0]), nn.functional.cross_entropy, Sgd())
    with pytest.raises(ConfigError, match="two or more samples"):
        export(one)
    with pytest.raises(ConfigError, match="go with plain SGD"):
        export(replace(models.plan("linear"), optimiser=Sgd(momentum=0.9)))
    shared = nn.Linear(3, 3)
    tied = nn.Sequential(shared, nn.ReLU(), shared)
    plan = TrainingPlan(tied, {"x": torch.rand(2, 3)}, torch.tensor([0, 1]), nn.functional.cross_entropy, Sgd())
    with pytest.raises(NotExportable, match="share one parameter"):
        export(plan)


def test_a_node_without_torch_needs_a_bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer, "find_spec", lambda name: None)
    with pytest.raises(CapabilityMissing, match=r"flwr is not installed, and .* no training bundle.*--train onnx"):
        trainer.trainer_module("auto", tmp_path)
    (tmp_path / TRAINING).write_bytes(b"")
    assert trainer.trainer_module("auto", tmp_path) == "fedtide.edge_agent.training.onnx"
    with pytest.raises(CapabilityMissing, match="flwr is not installed"):
        trainer.trainer_module("flower", tmp_path)
