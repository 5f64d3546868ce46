"""Byzantine-robust strategies: medians, trimmed means, Krum.

Strategies that compare updates with each other need all of them. Updates stay where they were received (under
our Grid large ones are mapped files) and are read shard by shard.
"""

from __future__ import annotations

import logging
import random
from abc import abstractmethod
from collections.abc import Iterable
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid

from fedtide.aggregation.strategies.averaging import FedAvg, Round, ScoredReply, book, refused
from fedtide.aggregation.sums.admission import Refusal
from fedtide.aggregation.sums.agreement import Agreement, read_only, ready
from fedtide.aggregation.sums.krum_scores import closest, squared_distances
from fedtide.aggregation.sums.order_statistics import keep_extremes, median_ranks, middle_mean
from fedtide.aggregation.sums.round_sum import RoundSum, Weight
from fedtide.aggregation.sums.weighted_sum import WeightedSum
from fedtide.fabric.flower import bridge as flower
from fedtide.fabric.tensors.frame import Tensor

log = logging.getLogger(__name__)


class _Comparing(FedAvg):
    """`combine` gets all accepted updates, by node, and returns the next model and the replies used."""

    supports_streaming = False
    sums = False

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        state = self.collecting()
        base = flower.tensors_of(state.base)
        kept: list[tuple[Message, list[Tensor]]] = []
        for reply in self._valid(state, replies):
            weight = state.admitted.pop(reply.task, None) or self.fits(state, reply.metrics, reply.update)
            if isinstance(weight, Refusal):
                refused(reply.message, weight)
                continue
            by_name = {t.name: t for t in reply.update}
            kept.append((reply.message, [by_name[t.name] for t in base]))
        if not kept:
            return None, None
        kept.sort(key=lambda k: k[0].metadata.src_node_id)
        model, chosen = self.combine(base, [u for _, u in kept], [m for m, _ in kept])
        for message in chosen:
            book(state, message)
        return _record(model), self.metrics_of(state)

    @abstractmethod
    def combine(
        self, base: list[Tensor], updates: list[list[Tensor]], messages: list[Message]
    ) -> tuple[Iterable[Tensor], list[Message]]:
        """The tensors of the next model, in the order of `base`, and the replies that were used."""


class CoordinateMedian(_Comparing):
    """The median of every coordinate. Yin et al. 2018, https://arxiv.org/abs/1803.01498."""

    def combine(
        self, base: list[Tensor], updates: list[list[Tensor]], messages: list[Message]
    ) -> tuple[Iterable[Tensor], list[Message]]:
        return middle_mean(base, updates, *median_ranks(len(updates))), messages


class TrimmedMean(_Comparing):
    """The mean of every coordinate without its largest and smallest values. Yin et al. 2018."""

    def __init__(self, *args: Any, beta: float = 0.2, **kwargs: Any) -> None:
        """
        Args:
            beta: share of the updates that is cut off at each end, from 0 to below 0.5 (as in Flower's FedTrimmedAvg).
        """
        super().__init__(*args, **kwargs)
        if not 0 <= beta < 0.5:
            raise ValueError(f"beta is {beta}, expected from 0 to below 0.5")
        self.beta = beta

    def combine(
        self, base: list[Tensor], updates: list[list[Tensor]], messages: list[Message]
    ) -> tuple[Iterable[Tensor], list[Message]]:
        cut = int(self.beta * len(updates))
        return middle_mean(base, updates, cut, len(updates) - cut), messages


class StreamingTrimmedMean(FedAvg):
    """The trimmed mean for a known number of hostile nodes: streams, in the memory of 4 f + 2 models.

    The values cut off are subtracted from the exact sum, so the order of updates does not matter.
    All updates weigh the same.
    """

    supports_streaming = False
    uniform_weights = True
    of_one_round = ("round", "_extremes")
    _extremes: list[tuple[Any, Any]]

    def __init__(self, *args: Any, num_malicious_nodes: int = 1, **kwargs: Any) -> None:
        """
        Args:
            num_malicious_nodes: f, at least 1; the number of values cut off at each end.
        """
        super().__init__(*args, **kwargs)
        if num_malicious_nodes < 1:
            raise ValueError(f"num_malicious_nodes is {num_malicious_nodes}, expected at least 1")
        self.num_malicious_nodes = num_malicious_nodes

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        messages = super().configure_train(server_round, arrays, config, grid)
        self._extremes = []
        for tensor in flower.tensors_of(arrays):
            shape = (self.num_malicious_nodes, tensor.spec.elements)
            # float64 whatever the model's dtype: nodes may send it, and exactly the added values are subtracted.
            self._extremes.append((np.full(shape, -np.inf), np.full(shape, np.inf)))
        return messages

    def _fold(self, state: Round, batch: list[ScoredReply]) -> list[ScoredReply]:
        counted = super()._fold(state, batch)
        for reply in counted:
            by_name = {t.name: t for t in reply.update}
            for tensor, (largest, smallest) in zip(flower.tensors_of(state.base), self._extremes, strict=True):
                new = by_name[tensor.name]
                keep_extremes(largest, smallest, read_only(ready(new.dtype, new.data).astype(largest.dtype)))
        return counted

    def moved(self, state: Round, total: RoundSum) -> ArrayRecord:
        cut = self.num_malicious_nodes
        if len(total) <= 2 * cut:
            log.warning("update.too_few count=%s cut=%s: the model stays", len(total), 2 * cut)
            return state.base
        for index, (largest, smallest) in enumerate(self._extremes):
            for row in (*largest, *smallest):
                if row.size:
                    total.total.fold(index, 0, [read_only(row)], [1.0], back=True)
        for _ in range(2 * cut):
            total.total.discount(1.0)
        return _record(total.total.mean())


class MedianOfMeans(FedAvg):
    """The median of the means of random buckets of nodes: streams, in the memory of one sum a bucket.

    Nodes are dealt to buckets anew in each round, by Python's generator. Chen et al. 2017,
    https://arxiv.org/abs/1705.05491.
    """

    supports_streaming = False

    def __init__(self, *args: Any, buckets: int = 5, **kwargs: Any) -> None:
        """
        Args:
            buckets: at least 1; more than twice the number of hostile nodes, to withstand them.
        """
        super().__init__(*args, **kwargs)
        if buckets < 1:
            raise ValueError(f"buckets is {buckets}, expected at least 1")
        self.buckets = buckets
        self._bucket_of: dict[int, int] = {}

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        messages = list(super().configure_train(server_round, arrays, config, grid))
        nodes = sorted(m.metadata.dst_node_id for m in messages)
        random.shuffle(nodes)
        self._bucket_of = {node: place % self.buckets for place, node in enumerate(nodes)}
        return messages

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        state = self.collecting()
        sums: dict[int, RoundSum] = {}
        agreement = state.sum.total.agreement
        for reply in self._valid(state, replies):
            weight = self.weight_of(reply.metrics)
            bucket = self._bucket_of.get(reply.message.metadata.src_node_id, 0)
            if isinstance(weight, Weight):
                (refusal,) = sums.setdefault(bucket, RoundSum(agreement)).add([reply.update], [weight])
            else:
                refusal = weight
            if refusal is None:
                book(state, reply.message)
            else:
                refused(reply.message, refusal)
        base = flower.tensors_of(state.base)
        means = [list(sums[k].total.mean()) for k in sorted(sums) if sums[k].share]
        if not means:
            return None, None
        return _record(middle_mean(base, means, *median_ranks(len(means)))), self.metrics_of(state)


class MultiKrum(_Comparing):
    """The mean of the updates that lie closest to their neighbours (see fedtide.aggregation.sums.krum_scores).

    Differs from Flower's by `neighbours`: there it is always n - f - 2, in byzfl n - f - 1.
    """

    def __init__(
        self,
        *args: Any,
        num_malicious_nodes: int = 0,
        num_nodes_to_select: int = 1,
        neighbours: int | None = None,
        **kwargs: Any,
    ) -> None:
        """
        Args:
            num_malicious_nodes: f.
            num_nodes_to_select: m; updates that are averaged, by their weights.
            neighbours: number of nearest updates in the score of an update; None: n - f - 2.
        """
        super().__init__(*args, **kwargs)
        if num_malicious_nodes < 0 or num_nodes_to_select < 1 or (neighbours is not None and neighbours < 1):
            raise ValueError("expected num_malicious_nodes >= 0, num_nodes_to_select >= 1 and neighbours >= 1")
        self.num_malicious_nodes = num_malicious_nodes
        self.num_nodes_to_select = num_nodes_to_select
        self.neighbours = neighbours

    def combine(
        self, base: list[Tensor], updates: list[list[Tensor]], messages: list[Message]
    ) -> tuple[Iterable[Tensor], list[Message]]:
        neighbours = self.neighbours or max(1, len(updates) - self.num_malicious_nodes - 2)
        chosen = closest(squared_distances(base, updates), neighbours, self.num_nodes_to_select)
        weights = []
        for k in chosen:
            weight = self.weight_of(next(iter(messages[k].content.metric_records.values())))
            assert isinstance(weight, Weight)
            weights.append(weight.term)
        total = WeightedSum(Agreement.of(base, len(chosen), exact=self.exact))
        faults = total.fold_all([updates[k] for k in chosen], weights)
        counted = [messages[k] for k, fault in zip(chosen, faults, strict=True) if fault is None]
        return (total.mean() if total.weight else base), counted


class Krum(MultiKrum):
    """The one update that lies closest to its neighbours."""

    def __init__(self, *args: Any, num_malicious_nodes: int = 0, neighbours: int | None = None, **kwargs: Any) -> None:
        super().__init__(*args, num_malicious_nodes=num_malicious_nodes, neighbours=neighbours, **kwargs)


def _record(model: Iterable[Tensor]) -> ArrayRecord:
    return ArrayRecord({t.name: flower.array_of(t) for t in model})
