"""Strategies that weight an update by its distance from the model that was sent.

All are one weighted mean: an update x_i that moves the model by d_i = x_i - x counts with a factor f_i, and the
next model is x + sum_i w_i f_i d_i / sum_i w_i. So they stream, in the memory of the sum and one update.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid

from fedtide.aggregation.strategies.averaging import FedAvg, Round
from fedtide.aggregation.sums.admission import Refusal, beyond, inspect
from fedtide.aggregation.sums.agreement import read_only, ready
from fedtide.aggregation.sums.kernels import product_of_gaps
from fedtide.aggregation.sums.round_sum import Weight, fsum
from fedtide.aggregation.sums.weighted_sum import BLOCK
from fedtide.fabric.flower import bridge as flower
from fedtide.fabric.tensors.frame import Tensor

FAR_OUT = Refusal("out_of_range", "the update is so far from the model that the distance overflows")


class _Bounded(FedAvg):
    """`factor` says how an update at a distance counts, or why it is refused."""

    supports_streaming = False

    @abstractmethod
    def factor(self, distance: float) -> float | Refusal:
        """At least 0; `distance` is finite."""

    def weigh(self, state: Round, metrics: MetricRecord, update: list[Tensor]) -> Weight | Refusal:
        weight = self.fits(state, metrics, update)
        if isinstance(weight, Refusal):
            return weight
        distance = math.sqrt(distances(flower.tensors_of(state.base), update)[0])
        if math.isinf(distance):
            return FAR_OUT
        factor = self.factor(distance)
        return factor if isinstance(factor, Refusal) else Weight(weight.share * factor, weight.share)


class NormBound(_Bounded):
    """Updates that move the model further than `bound` are scaled back to it, or refused.

    Sun et al. 2019, https://arxiv.org/abs/1911.07963.
    """

    def __init__(self, *args: Any, bound: float, refuse: bool = False, **kwargs: Any) -> None:
        """
        Args:
            bound: L2 norm over all tensors, above 0.
            refuse: do not count such updates at all.
        """
        super().__init__(*args, **kwargs)
        if not bound > 0:
            raise ValueError(f"bound is {bound}, expected a norm above 0")
        self.bound = bound
        self.refuse = refuse

    def factor(self, distance: float) -> float | Refusal:
        if distance <= self.bound:
            return 1.0
        return (beyond(distance, self.bound) if self.refuse else None) or self.bound / distance


class CentredClipping(_Bounded):
    """One step of centred clipping, around the model that went out; all updates weigh the same.

    Karimireddy et al. 2021, https://arxiv.org/abs/2012.10333, algorithm 1 with v_0 = x.
    """

    uniform_weights = True

    def __init__(self, *args: Any, radius: float, **kwargs: Any) -> None:
        """
        Args:
            radius: tau of the paper, an L2 norm over all tensors, above 0.
        """
        super().__init__(*args, **kwargs)
        if not radius > 0:
            raise ValueError(f"radius is {radius}, expected a norm above 0")
        self.radius = radius

    def factor(self, distance: float) -> float | Refusal:
        return 1.0 if distance <= self.radius else self.radius / distance


class FLTrust(FedAvg):
    """Updates are weighted by how far their direction agrees with the server's own update.

    Cao et al. 2021, https://arxiv.org/abs/2012.13995: trust = max(0, cos(d_i, d_0)), and each update is
    brought to the length of the server's.
    """

    supports_streaming = False
    uniform_weights = True
    of_one_round = ("round", "_own")
    _own: list[Tensor] | None = None

    def __init__(self, *args: Any, own_update: Callable[[int, ArrayRecord], ArrayRecord], **kwargs: Any) -> None:
        """
        Args:
            own_update: from (round, model) the model after training on the server's own small, clean data.
        """
        super().__init__(*args, **kwargs)
        self.own_update = own_update

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        messages = super().configure_train(server_round, arrays, config, grid)
        self._own = flower.tensors_of(self.own_update(server_round, arrays))
        if (refusal := inspect(flower.tensors_of(arrays), self._own)) is not None:
            raise ValueError(f"own_update gave another model: {refusal.reason}")
        return messages

    def weigh(self, state: Round, metrics: MetricRecord, update: list[Tensor]) -> Weight | Refusal:
        weight = self.fits(state, metrics, update)
        if isinstance(weight, Refusal):
            return weight
        assert self._own is not None
        length, product, own = distances(flower.tensors_of(state.base), update, self._own)
        if math.isinf(length) or math.isinf(product):
            return FAR_OUT
        if not length or not own:
            return Weight(0.0, 0.0)
        trust = max(0.0, product / math.sqrt(length * own))
        return Weight(trust * math.sqrt(own / length), trust)


def distances(base: list[Tensor], update: list[Tensor], other: list[Tensor] | None = None) -> tuple[float, ...]:
    """|d|^2 for d = update - base; with `other` also d * e and |e|^2 for e = other - base; over all tensors.

    In float64, block by block, in one order on every machine; infinite where that overflows.
    """
    found, third = ({t.name: t for t in tensors} for tensors in (update, other or ()))
    sums: list[list[float]] = [[], [], []]
    for tensor in base:
        views = [tensor, found[tensor.name], *([third[tensor.name]] if third else [])]
        flat = [ready(v.dtype, v.data) for v in views]
        if len({v.dtype for v in flat}) > 1:
            flat = [read_only(v.astype(np.float64)) for v in flat]
        for low in range(0, flat[0].size, BLOCK):
            x, y, *rest = (v[low : low + BLOCK] for v in flat)
            sums[0].append(product_of_gaps(y, x, y, x))
            for z in rest:
                sums[1].append(product_of_gaps(y, x, z, x))
                sums[2].append(product_of_gaps(z, x, z, x))
    return tuple(fsum(s) for s in sums[: 3 if other else 1])
