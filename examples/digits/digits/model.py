"""The network and its training: shared by federated nodes and the centralised baseline."""

from __future__ import annotations

import numpy.typing as npt
import torch
from torch import nn


class Net(nn.Module):
    """Two convolutions and two linear layers; images (N, 1, 28, 28) in [0, 1] to logits (N, 10)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 16, 5, padding=2)
        self.conv2 = nn.Conv2d(16, 32, 5, padding=2)
        self.fc1 = nn.Linear(32 * 7 * 7, 64)
        self.fc2 = nn.Linear(64, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.max_pool2d(torch.relu(self.conv1(x)), 2)
        x = torch.max_pool2d(torch.relu(self.conv2(x)), 2)
        return self.fc2(torch.relu(self.fc1(x.flatten(1))))


def make(seed: int) -> Net:
    """A freshly initialised network; equal seeds give equal weights."""
    torch.manual_seed(seed)
    return Net()


def train(
    net: Net,
    images: npt.NDArray,
    labels: npt.NDArray,
    *,
    epochs: int,
    batch: int,
    lr: float,
    momentum: float,
    seed: int,
) -> float:
    """SGD over shuffled batches; returns the mean loss of the last epoch."""
    x, y = torch.from_numpy(images), torch.from_numpy(labels)
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
def evaluate(net: Net, images: npt.NDArray, labels: npt.NDArray) -> tuple[float, float]:
    """(mean loss, accuracy)."""
    net.eval()
    logits = net(torch.from_numpy(images))
    y = torch.from_numpy(labels)
    return float(nn.functional.cross_entropy(logits, y)), float((logits.argmax(1) == y).float().mean())
