"""Every kind of model: fifty steps of changing batches end where eager torch does; exporting takes up to a minute."""

from __future__ import annotations

import pytest
import torch

from fedtide.aggregation.training_export.exporter import export
from fedtide.fabric.tensors.training_bundle import read
from tests.training import models, reference

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("name", [name for name in models.CASES if name != "mlp"])
def test_fifty_steps_end_where_torch_does(name: str) -> None:
    torch.set_num_threads(1)
    plan = models.plan(name, rows=40)
    bundle = read(export(models.plan(name)))
    given = reference.batches(plan, bundle)
    reference.assert_close(reference.in_runtime(plan, bundle, given), reference.in_torch(plan, given))
