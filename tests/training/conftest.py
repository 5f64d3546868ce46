"""One small bundle is exported once and used by all tests that need a bundle."""

from __future__ import annotations

import pytest
import torch

from fedtide.aggregation.training_export.exporter import export
from fedtide.fabric.tensors.training_bundle import TrainingBundle, read
from tests.training import models


@pytest.fixture(scope="session")
def bundle() -> TrainingBundle:
    torch.set_num_threads(1)
    return read(export(models.plan("mlp"), {"momentum": 0.9}))
