"""Federated averaging with central differential privacy: clip, sum, add noise.

McMahan et al. 2018, https://arxiv.org/abs/1710.06963; adaptive clipping: Andrew et al. 2021,
https://arxiv.org/abs/1905.03871. The unit of privacy is a node; who takes part is not secret.

The noise is Gaussian in float arithmetic from a generator seeded by the operating system: what Mironov 2012
("On significance of the least significant bits") says of such noise applies.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Iterable
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid

from fedtide.aggregation.strategies.averaging import FedAvg, Round, ScoredReply
from fedtide.aggregation.strategies.bounded import FAR_OUT, distances
from fedtide.aggregation.sums.admission import Refusal
from fedtide.aggregation.sums.round_sum import RoundSum, Weight
from fedtide.fabric.flower import bridge as flower
from fedtide.fabric.tensors.frame import Tensor


class PrivateFedAvg(FedAvg):
    """All updates have the same weight. Integer tensors stay unchanged, since noise cannot hide them.

    Attributes:
        clip: the L2 norm that updates are scaled back to, over all float tensors; moves if clipping is adaptive.
        rounds_by_cohort: number of rounds, by number of updates averaged.
    """

    supports_streaming = False
    uniform_weights = True

    def __init__(
        self,
        *args: Any,
        noise_multiplier: float,
        clip: float,
        delta: float = 1e-5,
        population: int | None = None,
        target_quantile: float | None = None,
        clip_learning_rate: float = 0.2,
        count_noise: float | None = None,
        **kwargs: Any,
    ) -> None:
        """
        Args:
            noise_multiplier: z; the standard deviation of the noise on the sum of updates, in units of `clip`.
            delta: of the guarantee.
            population: how many nodes cohorts are drawn from at random; None: claim nothing from sampling.
            target_quantile: gamma; adapt `clip` so that this share of updates is not clipped. None: fixed.
            count_noise: sigma_b, noise on the number of updates that were not clipped; None: a twentieth of
                the updates of the first round.
        """
        super().__init__(*args, **kwargs)
        if not (noise_multiplier > 0 and clip > 0 and 0 < delta < 1):
            raise ValueError("expected noise_multiplier > 0, clip > 0 and 0 < delta < 1")
        if target_quantile is not None and not 0 < target_quantile < 1:
            raise ValueError(f"target_quantile is {target_quantile}, expected a share between 0 and 1")
        self.noise_multiplier = noise_multiplier
        self.clip = clip
        self.delta = delta
        self.population = population
        self.target_quantile = target_quantile
        self.clip_learning_rate = clip_learning_rate
        self.count_noise = count_noise
        self.rounds_by_cohort: dict[int, int] = {}
        # Part of the strategy's state. A round repeated after a crash draws the same noise: two noises on one sum
        # would reveal more than the ledger says. If other nodes count, it draws different noise: one noise on
        # two sums would reveal their difference.
        self.next_seed = secrets.randbits(128)
        self._not_clipped = 0

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        self._not_clipped = 0
        return super().configure_train(server_round, arrays, config, grid)

    def weigh(self, state: Round, metrics: MetricRecord, update: list[Tensor]) -> Weight | Refusal:
        weight = self.fits(state, metrics, update)
        if isinstance(weight, Refusal):
            return weight
        floats = [t for t in flower.tensors_of(state.base) if _is_float(t)]
        distance = math.sqrt(distances(floats, update)[0])
        if math.isinf(distance):
            return FAR_OUT
        return Weight(1.0 if distance <= self.clip else self.clip / distance, 1.0)

    def _fold(self, state: Round, batch: list[ScoredReply]) -> list[ScoredReply]:
        for reply in batch:
            weight = state.admitted.get(reply.task) or self.weigh(state, reply.metrics, reply.update)
            if isinstance(weight, Weight):
                state.admitted[reply.task] = weight
        untouched = {r.task for r in batch if r.task in state.admitted and state.admitted[r.task].term == 1.0}
        counted = super()._fold(state, batch)
        self._not_clipped += sum(reply.task in untouched for reply in counted)
        return counted

    def moved(self, state: Round, total: RoundSum) -> ArrayRecord:
        count = len(total)
        nodes = sorted(node for node, _ in state.contents)
        generator = np.random.Generator(np.random.PCG64DXSM(np.random.SeedSequence([self.next_seed, *nodes])))
        self.next_seed = secrets.randbits(128)
        self.rounds_by_cohort[count] = self.rounds_by_cohort.get(count, 0) + 1
        clip, noise = self.clip, self.noise_multiplier
        if self.target_quantile is not None:
            noise = self._adapt(count, generator)
        return self._noised(state, super().moved(state, total), noise * clip / count, generator)

    def _adapt(self, count: int, generator: np.random.Generator) -> float:
        """Move `clip` towards the quantile; returns the noise multiplier that is left for the updates."""
        self.count_noise = self.count_noise or count / 20
        # Andrew et al. 2021, theorem 1: both queries together cost what one at `noise_multiplier` costs.
        left = self.noise_multiplier**-2 - (2 * self.count_noise) ** -2
        if left <= 0:
            raise ValueError(
                f"count_noise is {self.count_noise}: for a noise_multiplier of {self.noise_multiplier} "
                f"it must be above {self.noise_multiplier / 2}"
            )
        share = (self._not_clipped + generator.standard_normal() * self.count_noise) / count
        assert self.target_quantile is not None
        self.clip *= math.exp(-self.clip_learning_rate * (share - self.target_quantile))
        return float(left**-0.5)

    def _noised(self, state: Round, mean: ArrayRecord, deviation: float, generator: np.random.Generator) -> ArrayRecord:
        noised = {}
        for tensor in flower.tensors_of(state.base):
            if not _is_float(tensor):
                noised[tensor.name] = flower.array_of(tensor)
                continue
            values = mean[tensor.name].numpy()
            with_noise = values + generator.standard_normal(values.shape) * deviation
            noised[tensor.name] = flower.array_of(Tensor.of(tensor.name, np.asarray(with_noise, values.dtype)))
        return ArrayRecord(noised)


def _is_float(tensor: Tensor) -> bool:
    return tensor.dtype in ("F16", "F32", "F64", "BF16")
