"""Training on a node: the order of samples, the steps, and where a task goes on that was ended."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from fedtide.edge_agent.samples.source import Columns
from fedtide.edge_agent.serving.scoring import Array
from fedtide.edge_agent.training.onnx.batches import Batches
from fedtide.edge_agent.training.onnx.learning import TrainingParams, TrainingResult, learn, measure
from fedtide.edge_agent.training.onnx.shuffle import TorchShuffle
from fedtide.edge_agent.training.onnx.task import model_values
from fedtide.fabric.tensors.training_bundle import TrainingBundle
from tests.training import models, reference


@pytest.mark.parametrize(("size", "seed"), [(0, 1), (1, 1), (2, 3), (667, 5), (5000, 2**40 + 7)])
def test_samples_come_in_the_order_that_torch_draws(size: int, seed: int) -> None:
    generator, shuffle = torch.Generator().manual_seed(seed), TorchShuffle(seed)
    for _ in range(3):
        assert np.array_equal(torch.randperm(size, generator=generator).numpy(), shuffle.permutation(size))


@pytest.mark.slow
def test_fifty_steps_of_changing_batches_end_where_torch_does(bundle: TrainingBundle) -> None:
    plan = models.plan("mlp", rows=40)
    given = reference.batches(plan, bundle)
    reference.assert_close(reference.in_runtime(plan, bundle, given), reference.in_torch(plan, given))


class Ended(Exception):
    pass


class EndsAt:
    """A data source that ends the trainer at its n-th batch."""

    def __init__(self, source: Columns, reads: int) -> None:
        self._source, self._left = source, reads

    def __len__(self) -> int:
        return len(self._source)

    def read(self, indices: Sequence[int]) -> dict[str, Array]:
        self._left -= 1
        if self._left < 0:
            raise Ended
        return self._source.read(indices)


@pytest.mark.parametrize("reads", [2, 5, 6, 9])
def test_a_task_that_was_ended_goes_on_at_its_step(bundle: TrainingBundle, tmp_path: Path, reads: int) -> None:
    plan = models.plan("mlp", rows=30)
    source, values = reference.columns(plan), model_values(bundle, reference.state(plan))

    def train(batches: Batches, folder: Path) -> TrainingResult:
        params = TrainingParams(epochs=3, batch_size=8, rate=0.05, seed=4)
        given = {**values, "mu": np.array(0.0, np.float32)}
        return learn(bundle, batches, given, params, 1, folder / "progress", checkpoint_s=0)

    whole = train(Batches(source, bundle.manifest), tmp_path)
    (tmp_path / "again").mkdir()
    with pytest.raises(Ended):
        train(Batches(EndsAt(source, reads), bundle.manifest), tmp_path / "again")
    rest = EndsAt(source, 1 + 12 - (reads - 1))
    resumed = train(Batches(rest, bundle.manifest), tmp_path / "again")
    assert resumed.steps == whole.steps == 12
    assert resumed.loss == whole.loss
    for name, array in whole.values.items():
        assert np.array_equal(resumed.values[name], array), name


def test_progress_over_other_data_is_not_used(bundle: TrainingBundle, tmp_path: Path) -> None:
    for rows in (30, 20):
        plan = models.plan("mlp", rows=rows)
        values = {**model_values(bundle, reference.state(plan)), "mu": np.array(0.0, np.float32)}
        batches = Batches(reference.columns(plan), bundle.manifest)
        result = learn(
            bundle, batches, values, TrainingParams(1, 10, 0.05, 1), 1, tmp_path / "progress", checkpoint_s=0
        )
        assert result.steps == rows // 10


def test_a_model_is_measured_over_all_samples(bundle: TrainingBundle) -> None:
    plan = models.plan("mlp", rows=23)
    batches = Batches(reference.columns(plan), bundle.manifest)
    found = measure(bundle, batches, model_values(bundle, reference.state(plan)), 5, 1)
    with torch.no_grad():
        logits = plan.module(plan.inputs["x"])
    assert found["accuracy"] == pytest.approx(float(models.accuracy(logits, plan.target)))
    assert found["loss"] == pytest.approx(float(plan.loss(logits, plan.target)), rel=1e-5)


def test_a_rest_that_torch_would_refuse_is_left_out(bundle: TrainingBundle, tmp_path: Path) -> None:
    alone = TrainingBundle(bundle.manifest.model_copy(update={"smallest_batch": 2}), bundle.parts)
    plan = models.plan("mlp", rows=9)
    values = model_values(bundle, reference.state(plan))
    batches = Batches(reference.columns(plan), bundle.manifest)
    assert learn(alone, batches, values, TrainingParams(1, 4, 0.05, 1), 1, tmp_path / "progress", 9).steps == 2
    assert learn(bundle, batches, values, TrainingParams(1, 4, 0.05, 1), 1, tmp_path / "progress", 9).steps == 3
