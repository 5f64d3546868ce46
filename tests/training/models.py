"""The kinds of models that train without torch, each as a plan."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fedtide.aggregation.training_export.optimisers import Adam, Sgd
from fedtide.aggregation.training_export.plan import TrainingPlan

CLASSES = 5


class Last(nn.Module):
    """A recurrent network's last state, classified."""

    def __init__(self, kind: type[nn.GRU] | type[nn.LSTM]) -> None:
        super().__init__()
        self.recurrent = kind(4, 8, batch_first=True)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.recurrent(x)[0][:, -1])


class Encoder(nn.Module):
    """Tokens, a transformer encoder with dropout, and the mean of what it says."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(20, 16)
        layer = nn.TransformerEncoderLayer(16, 2, 24, dropout=0.1, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.head = nn.Linear(16, CLASSES)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.layers(self.tokens(tokens)).mean(1))


class LowRank(nn.Module):
    """A frozen layer with a trained difference of rank two (Hu et al. 2021, https://arxiv.org/abs/2106.09685)."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(12, 16)
        self.base.requires_grad_(False)
        self.down = nn.Linear(12, 2, bias=False)
        self.up = nn.Linear(2, 16, bias=False)
        nn.init.zeros_(self.up.weight)
        self.head = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.base(x) + self.up(self.down(x))))


def _lenet() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 4, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(4, 6, 3, stride=2),
        nn.Tanh(),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(6, CLASSES),
    )


def _normalised() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1, groups=2, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.MaxPool2d(3, stride=2, padding=1),
        nn.Flatten(),
        nn.LayerNorm(64),
        nn.Dropout(0.25),
        nn.Linear(64, CLASSES),
    )


def _one_dimensional() -> nn.Module:
    return nn.Sequential(
        nn.Conv1d(3, 8, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool1d(2),
        nn.Conv1d(8, 8, 3, dilation=2),
        nn.ReLU(),
        nn.AdaptiveAvgPool1d(1),
        nn.Flatten(),
        nn.Linear(8, CLASSES),
    )


def _mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(12, 128), nn.ReLU(), nn.Linear(128, CLASSES))


def accuracy(logits: Any, target: Tensor) -> Tensor:
    return (logits.argmax(1) == target).to(torch.float32).mean()


Case = tuple[Callable[[], nn.Module], tuple[int, ...], dict[str, Any]]

CASES: dict[str, Case] = {
    "mlp": (_mlp, (12,), {"optimiser": Sgd(0.9, weight_decay=1e-3), "proximal": True}),
    "linear": (lambda: nn.Linear(12, CLASSES), (12,), {"optimiser": Sgd(), "controls": True}),
    "lenet": (_lenet, (1, 14, 14), {"optimiser": Sgd(momentum=0.9, nesterov=True)}),
    "conv1d": (_one_dimensional, (3, 20), {"optimiser": Adam()}),
    "norms": (_normalised, (2, 8, 8), {"optimiser": Adam(weight_decay=0.01, decoupled=True), "clip_norm": 1.0}),
    "gru": (lambda: Last(nn.GRU), (6, 4), {"optimiser": Sgd(momentum=0.9)}),
    "lstm": (lambda: Last(nn.LSTM), (6, 4), {"optimiser": Adam(weight_decay=0.01)}),
    "encoder": (Encoder, (7,), {"optimiser": Sgd(momentum=0.9)}),
    "lora": (LowRank, (12,), {"optimiser": Sgd(), "controls": True}),
}


def plan(name: str, rows: int = 6) -> TrainingPlan:
    make, shape, more = CASES[name]
    torch.manual_seed(1)
    module = make()
    x = torch.randint(0, 20, (rows, *shape)) if name == "encoder" else torch.randn(rows, *shape)
    target = torch.randint(0, CLASSES, (rows,))
    return TrainingPlan(module, {"x": x}, target, nn.functional.cross_entropy, metrics={"accuracy": accuracy}, **more)
