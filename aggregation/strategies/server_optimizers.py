"""Strategies that treat the streamed mean as a pseudo-gradient: Flower's own arithmetic on our sum.

FedAvgM: Hsu et al. 2019, https://arxiv.org/abs/1909.06335. FedAdam, FedYogi, FedAdagrad: Reddi et al. 2021,
https://arxiv.org/abs/2003.00295. FedProx: Li et al. 2020, https://arxiv.org/abs/1812.06127 (the proximal term is the
node's: its weight travels as `proximal-mu`). They take Flower's arguments. The adaptive ones have other default steps:
at Flower's they end below FedAvg, or diverge, on skewed splits of our digits (`make bench NAME=quality`).
"""

from __future__ import annotations

from typing import Any

from flwr.serverapp import strategy as flowers

from fedtide.aggregation.strategies.averaging import FedAvg


class FedProx(flowers.FedProx, FedAvg):
    """FedAvg whose nodes are held near the model that they were given."""


class FedAvgM(flowers.FedAvgM, FedAvg):
    """FedAvg with momentum on the server."""


class FedAdam(flowers.FedAdam, FedAvg):
    """Adam on the server; Flower's default `eta` is 0.1."""

    def __init__(self, *, eta: float = 0.03, **kwargs: Any) -> None:
        super().__init__(eta=eta, **kwargs)


class FedYogi(flowers.FedYogi, FedAvg):
    """Yogi on the server; Flower's default `eta` is 0.01."""

    def __init__(self, *, eta: float = 0.03, **kwargs: Any) -> None:
        super().__init__(eta=eta, **kwargs)


class FedAdagrad(flowers.FedAdagrad, FedAvg):
    """Adagrad on the server; Flower's defaults are `eta` 0.1 and `tau` 0.001."""

    def __init__(self, *, eta: float = 0.03, tau: float = 0.01, **kwargs: Any) -> None:
        super().__init__(eta=eta, tau=tau, **kwargs)
