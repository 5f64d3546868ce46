"""One step of an optimiser as arithmetic on tensors, as torch.optim does it, bit by bit where float32 allows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

Named = dict[str, Tensor]


class Optimiser(Protocol):
    """Slots are tensors of a parameter's shape that start as zeros, such as a momentum."""

    @property
    def slots(self) -> Sequence[str]: ...

    @property
    def usual_rate(self) -> float:
        """A typical learning rate for this optimiser."""
        ...

    def update(self, p: Tensor, grad: Tensor, slots: Mapping[str, Tensor], rate: Tensor, step: Tensor) -> list[Tensor]:
        """The new parameter and its new slots. `step` counts from 1 (int64), `rate` is a float32 scalar."""
        ...

    def eager(self, parameters: Sequence[Tensor], rate: float) -> torch.optim.Optimizer:
        """The equivalent torch optimiser, for comparison."""
        ...


@dataclass(frozen=True, slots=True)
class Sgd:
    """Stochastic gradient descent (torch.optim.SGD)."""

    momentum: float = 0.0
    weight_decay: float = 0.0
    nesterov: bool = False

    @property
    def slots(self) -> Sequence[str]:
        return ("momentum",) if self.momentum else ()

    @property
    def usual_rate(self) -> float:
        return 0.01

    def update(self, p: Tensor, grad: Tensor, slots: Mapping[str, Tensor], rate: Tensor, step: Tensor) -> list[Tensor]:
        if self.weight_decay:
            grad = grad + self.weight_decay * p
        if not self.momentum:
            return [p - rate * grad]
        momentum = self.momentum * slots["momentum"] + grad
        direction = grad + self.momentum * momentum if self.nesterov else momentum
        return [p - rate * direction, momentum]

    def eager(self, parameters: Sequence[Tensor], rate: float) -> torch.optim.Optimizer:
        return torch.optim.SGD(
            parameters, rate, momentum=self.momentum, weight_decay=self.weight_decay, nesterov=self.nesterov
        )


@dataclass(frozen=True, slots=True)
class Adam:
    """Kingma and Ba 2015, https://arxiv.org/abs/1412.6980; `decoupled`: AdamW, https://arxiv.org/abs/1711.05101."""

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    decoupled: bool = False

    @property
    def slots(self) -> Sequence[str]:
        return ("first", "second")

    @property
    def usual_rate(self) -> float:
        return 0.001

    def update(self, p: Tensor, grad: Tensor, slots: Mapping[str, Tensor], rate: Tensor, step: Tensor) -> list[Tensor]:
        if self.weight_decay and self.decoupled:
            p = p - rate * self.weight_decay * p
        elif self.weight_decay:
            grad = grad + self.weight_decay * p
        one, two = self.betas
        first = slots["first"] + (grad - slots["first"]) * (1 - one)
        second = slots["second"] * two + grad * grad * (1 - two)
        # In float32, 1 - 0.999 is off by 6e-5.
        count = step.to(torch.float64)
        unbias_first = 1.0 - torch.exp(count * torch.log(torch.tensor(one, dtype=torch.float64)))
        unbias_second = torch.sqrt(1.0 - torch.exp(count * torch.log(torch.tensor(two, dtype=torch.float64))))
        # As torch, with numerator and denominator scaled: the exporter would simplify `x + 1e-8` to x.
        size = (rate.to(torch.float64) * unbias_second / unbias_first).to(torch.float32)
        spread = torch.sqrt(second) + (self.eps * unbias_second).to(torch.float32)
        return [p - size * first / spread, first, second]

    def eager(self, parameters: Sequence[Tensor], rate: float) -> torch.optim.Optimizer:
        kind = torch.optim.AdamW if self.decoupled else torch.optim.Adam
        return kind(parameters, rate, betas=self.betas, eps=self.eps, weight_decay=self.weight_decay)


def clipped(grads: Named, most: float) -> Named:
    """Gradients scaled so that their common norm is at most `most` (torch.nn.utils.clip_grad_norm_)."""
    norm = torch.sqrt(torch.stack([(g * g).sum() for g in grads.values()]).sum())
    factor = torch.clamp(most / (norm + 1e-6), max=1.0)
    return {name: g * factor for name, g in grads.items()}
