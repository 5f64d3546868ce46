"""The same training as `model.train`, for nodes without torch."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from digits import model
from fedtide.aggregation.training_export.optimisers import Sgd
from fedtide.aggregation.training_export.plan import TrainingPlan


def plan(config: Mapping[str, bool | int | float | str]) -> TrainingPlan:
    return TrainingPlan(
        module=model.make(0),
        inputs={"image": torch.rand(2, 1, 28, 28)},
        target=torch.tensor([0, 9]),
        loss=nn.functional.cross_entropy,
        optimiser=Sgd(momentum=float(config["momentum"])),
        metrics={"accuracy": lambda logits, labels: (logits.argmax(1) == labels).float().mean()},
        data="digits.source:of_node",
    )
