"""An app's description of its training: the hook named by `tool.fedtide.app.training` returns a `TrainingPlan`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from fedtide.aggregation.training_export.optimisers import Optimiser
from fedtide.fabric.tensors.preprocessing import Preprocessing
from fedtide.fabric.tensors.training_bundle import Settings

Measure = Callable[[Any, Tensor], Tensor]
"""(module outputs, labels) -> a scalar, the mean over the batch."""


@dataclass(frozen=True, slots=True)
class TrainingPlan:
    """One app's training, as it would be in torch.

    `inputs` are a sample batch by column name, in the order of the module's arguments; `target` its labels. Their
    first axis is the batch, of at least two samples; every other axis is fixed by them. Parameters that do not
    require a gradient stay as they are.
    """

    module: nn.Module
    inputs: Mapping[str, Tensor]
    target: Tensor
    loss: Measure
    optimiser: Optimiser
    metrics: Mapping[str, Measure] = field(default_factory=dict)
    clip_norm: float | None = None
    proximal: bool = False
    """FedProx, with `proximal-mu` of the message: Li et al. 2020, https://arxiv.org/abs/1812.06127."""
    controls: bool = False
    """SCAFFOLD's control variates, with plain SGD: https://arxiv.org/abs/1910.06378, option II."""
    train_loss: str = "train_loss"
    """Metric names as in the app's ClientApp: Flower requires the same names from all nodes."""
    evaluation_loss: str = "loss"
    report_steps: bool = False
    """Whether to report the metric `num-steps`, which FedNova needs; always on with `controls`."""
    settings: Settings = field(default_factory=Settings)
    data: str = ""
    """`module:function` of (node config, run config) that opens the node's data source, without torch and flwr.
    Empty: the samples that the node captured for the app's model."""
    preprocessing: Sequence[Preprocessing] = ()
    """Preprocessing of the source's columns; for captured samples, which are requests, that of the export hook."""
