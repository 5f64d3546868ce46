"""The network and its training."""

from __future__ import annotations

import numpy.typing as npt
import torch
from torch import nn


class Net(nn.Module):
    """A small 1-D CNN; normalised windows (N, 100, 6) to logits (N, 7)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv1d(6, 32, 7, padding=3)
        self.conv2 = nn.Conv1d(32, 64, 5, padding=2)
        self.head = nn.Linear(64, 7)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.max_pool1d(torch.relu(self.conv1(x.transpose(1, 2))), 2)
        x = torch.relu(self.conv2(x))
        return self.head(x.mean(2))


def make(seed: int) -> Net:
    """A freshly initialised network; equal seeds give equal weights."""
    torch.manual_seed(seed)
    return Net()


def train(
    net: Net,
    windows: npt.NDArray,
    labels: npt.NDArray,
    *,
    epochs: int,
    batch: int,
    lr: float,
    momentum: float,
    seed: int,
) -> float:
    """SGD over shuffled batches; returns the mean loss of the last epoch."""
    x, y = torch.from_numpy(windows), torch.from_numpy(labels)
    optimiser = torch.optim.SGD(net.parameters(), lr=lr, momentum=momentum)
    shuffle = torch.Generator().manual_seed(seed)
    net.train()
    mean = 0.0
    for _ in range(epochs):
        losses = []
        for indices in torch.randperm(len(x), generator=shuffle).split(batch):
            optimiser.zero_grad()
            loss = nn.functional.cross_entropy(net(x[indices]), y[indices])
            loss.backward()
            optimiser.step()
            losses.append(loss.item())
        mean = sum(losses) / max(1, len(losses))
    return mean


@torch.no_grad()
def evaluate(net: Net, windows: npt.NDArray, labels: npt.NDArray) -> tuple[float, float]:
    """(mean loss, accuracy)."""
    net.eval()
    logits = net(torch.from_numpy(windows))
    y = torch.from_numpy(labels)
    return float(nn.functional.cross_entropy(logits, y)), float((logits.argmax(1) == y).float().mean())
