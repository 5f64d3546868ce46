"""FedNova: normalises updates by their number of local steps.

Wang et al. 2020, https://arxiv.org/abs/2007.07481, eq. 9 for SGD without momentum (a_i = number of steps):
x + tau_eff * sum_i p_i (x_i - x) / tau_i, where tau_eff = sum_i p_i tau_i and p_i is the share of examples.
"""

from __future__ import annotations

from fractions import Fraction
from typing import Any

from flwr.app import MetricRecord

from fedtide.aggregation.strategies.averaging import FedAvg, Round
from fedtide.aggregation.sums.admission import Refusal
from fedtide.aggregation.sums.round_sum import RoundSum, Weight


class FedNova(FedAvg):
    """Needs the number of local steps in every reply's metrics, under `steps_key`."""

    def __init__(self, *args: Any, steps_key: str = "num-steps", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.steps_key = steps_key

    def weight_of(self, metrics: MetricRecord) -> Weight | Refusal:
        weight = super().weight_of(metrics)
        steps = metrics.get(self.steps_key)
        if isinstance(weight, Refusal):
            return weight
        if isinstance(steps, bool) or not isinstance(steps, int) or not 1 <= steps < 2**53:
            return Refusal("bad_weight", f"{self.steps_key!r} is {steps!r}, expected a number of steps of at least 1")
        return Weight(weight.share / steps, weight.share)

    def step(self, state: Round, total: RoundSum) -> float:
        steps = Fraction(0)
        for _, content in state.contents:
            (metrics,) = content.metric_records.values()
            weight = super().weight_of(metrics)
            assert isinstance(weight, Weight)
            steps += Fraction(weight.share) * Fraction(int(metrics[self.steps_key]))  # type: ignore[arg-type]
        return float(steps / total.share * total.total.weight / total.share)
