"""Streaming FedAvg: updates are folded as they arrive and dropped; the mean does not depend on their order.

McMahan et al. 2017, https://arxiv.org/abs/1602.05629. A drop-in for `flwr.serverapp.strategy.FedAvg`
under any Grid; the others of this package build on it. Under our Grid updates are folded while
they are still arriving (`expect`).

An update that does not fit (names, shapes, NaN, its weight) is refused and logged, and the others count;
Flower's own ends the run instead.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp import strategy as flowers
from flwr.serverapp.exception import AggregationError

from fedtide.aggregation.sums.admission import Refusal, inspect
from fedtide.aggregation.sums.agreement import Agreement
from fedtide.aggregation.sums.round_sum import RoundSum, StreamingUpdate, Weight
from fedtide.fabric.errors import MalformedMessage
from fedtide.fabric.flower import bridge as flower
from fedtide.fabric.tensors.codecs import decode, is_coded
from fedtide.fabric.tensors.frame import Tensor

log = logging.getLogger(__name__)

MAX_UPDATES = 2048
"""Updates that the fixed point of a round allows for; a round that asks more nodes allows for more."""

_TOGETHER = 4
"""Number of updates folded in one pass, if that many have arrived."""


@dataclass(slots=True)
class Round:
    """The state of one round: the model that was sent, and the sum."""

    base: ArrayRecord
    sum: RoundSum
    contents: list[tuple[int, RecordDict]] = field(default_factory=list)
    """(node, the reply's content without arrays) of every update that counts."""
    admitted: dict[str, Weight] = field(default_factory=dict)
    """Weights that `admit` found for replies that are not folded yet, by task."""


@dataclass(frozen=True, slots=True)
class ScoredReply:
    """A reply with one record of metrics and one of arrays. `update` views the message unless it `was_coded`."""

    message: Message
    metrics: MetricRecord
    update: list[Tensor]
    was_coded: bool

    @classmethod
    def of(cls, message: Message, sent: ArrayRecord) -> ScoredReply:
        """Raises MalformedMessage if the arrays are coded and do not decode."""
        (metrics,) = message.content.metric_records.values()
        (record,) = message.content.array_records.values()
        tensors = flower.tensors_of(record)
        was_coded = is_coded(tensors) or any(isinstance(a, flower.CodedArray) for a in record.values())
        if is_coded(tensors):
            base = {t.name: t for t in flower.tensors_of(sent)}
            tensors = [decode(t, base) for t in tensors]
        return cls(message, metrics, tensors, was_coded)

    @property
    def task(self) -> str:
        return self.message.metadata.reply_to_message_id


class FedAvg(flowers.FedAvg):
    """Takes the arguments of `flwr.serverapp.strategy.FedAvg`.

    Attributes:
        exact: sums are in fixed point; False: in float64, where values span more than fixed point can hold.
    """

    of_one_round: tuple[str, ...] = ("round",)
    exact = True
    sums = True
    """Whether `admit` requires that updates fit the round's sum."""
    uniform_weights = False
    """Whether all updates weigh the same."""
    round: Round | None = None

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Choose nodes and make their messages, as Flower's FedAvg does."""
        messages = list(super().configure_train(server_round, arrays, config, grid))
        # Created before the first reply: the receiving thread folds updates into it.
        model = flower.tensors_of(arrays)
        self.round = Round(arrays, RoundSum(Agreement.of(model, max(MAX_UPDATES, len(messages)), exact=self.exact)))
        return messages

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """The weighted mean of the replies' arrays and metrics; (None, None) if none counts."""
        state = self.collecting()
        for batch in _batches(self._valid(state, replies)):
            self._fold(state, batch)
        return self._close(state)

    supports_streaming = True
    """Whether updates can be folded piece by piece (`expect`), without seeing them whole."""

    def expect(self, key: str, metrics: MetricRecord, frame_bytes: int) -> StreamingUpdate | Refusal:
        """Begin to fold an update that is still arriving, as the answer to the task `key`."""
        weight = self.weight_of(metrics)
        if isinstance(weight, Refusal):
            return weight
        return self.collecting().sum.expect(key, weight, frame_bytes)

    def admit(self, message: Message) -> Refusal | None:
        """Why a reply is refused, or None. Our Grid calls this before it reports the reply as received."""
        state = self.collecting()
        if (refusal := incomplete(message)) is not None:
            return refusal
        reply = ScoredReply.of(message, state.base)
        misfit = inspect(flower.tensors_of(state.base), reply.update)
        weight = misfit or self.weigh(state, reply.metrics, reply.update)
        if isinstance(weight, Refusal):
            return weight
        if self.sums and (refusal := state.sum.too_large(reply.update, weight)) is not None:
            return refusal
        state.admitted[reply.task] = weight
        return None

    def weight_of(self, metrics: MetricRecord) -> Weight | Refusal:
        """The weight of an update, from the metrics that its node reports."""
        value = metrics.get(self.weighted_by_key)
        if isinstance(value, bool) or not isinstance(value, int | float):
            return Refusal("bad_weight", f"the metrics hold no number {self.weighted_by_key!r}")
        try:
            weight = float(value)
        except OverflowError:
            weight = math.inf
        if not (math.isfinite(weight) and weight >= 0):
            return Refusal("bad_weight", f"{self.weighted_by_key!r} is {weight}, expected a weight of at least 0")
        return Weight(1.0, 1.0) if self.uniform_weights else Weight(weight, weight)

    def fits(self, state: Round, metrics: MetricRecord, update: list[Tensor]) -> Weight | Refusal:
        """The weight of an update, after checking that it fits the model; else the refusal."""
        return inspect(flower.tensors_of(state.base), update) or self.weight_of(metrics)

    def step(self, state: Round, total: RoundSum) -> float:
        """How far the model moves from the one that went out to the weighted mean; 1: all the way."""
        return float(total.total.weight / total.share)

    def collecting(self) -> Round:
        """The round under way."""
        if self.round is None:
            raise AggregationError("configure_train must come first: updates are compared with what was sent")
        return self.round

    def _valid(self, state: Round, replies: Iterable[Message]) -> Iterator[ScoredReply]:
        """Replies whose arrays are still to be folded; those folded on arrival are only recorded."""
        failures = 0
        for message in replies:
            if message.has_error():
                failures += 1
                log.info("update.error node=%s reason=%s", message.metadata.src_node_id, message.error.reason)
                continue
            if state.sum.holds(message.metadata.reply_to_message_id):
                book(state, message)
            elif (refusal := incomplete(message)) is not None:
                refused(message, refusal)
            else:
                try:
                    reply = ScoredReply.of(message, state.base)
                except MalformedMessage as exc:
                    refused(message, Refusal("malformed", str(exc)))
                    continue
                yield reply
        log.info("aggregate_train: %s updates, %s failures", len(state.contents), failures)

    def _fold(self, state: Round, batch: list[ScoredReply]) -> list[ScoredReply]:
        """Add a batch of replies to the sum; returns those that were accepted."""
        replies, weights = [], []
        for reply in batch:
            weight = state.admitted.pop(reply.task, None) or self.weigh(state, reply.metrics, reply.update)
            if isinstance(weight, Refusal):
                refused(reply.message, weight)
                continue
            replies.append(reply)
            weights.append(weight)
        refusals = state.sum.add([r.update for r in replies], weights)
        for reply, refusal in zip(replies, refusals, strict=True):
            if refusal is None:
                book(state, reply.message)
            else:
                refused(reply.message, refusal)
        return [reply for reply, refusal in zip(replies, refusals, strict=True) if refusal is None]

    def weigh(self, state: Round, metrics: MetricRecord, update: list[Tensor]) -> Weight | Refusal:
        """As `weight_of`, for strategies whose weight depends on the update itself."""
        return self.weight_of(metrics)

    def _close(self, state: Round) -> tuple[ArrayRecord | None, MetricRecord | None]:
        if not state.contents:
            return None, None
        total = state.sum
        if not total.share:
            log.warning("update.no_weight: the weights of all %s updates are 0; the model stays", len(state.contents))
            return None, None
        return self.moved(state, total), self.metrics_of(state)

    def metrics_of(self, state: Round) -> MetricRecord:
        """The metrics of the updates that count, aggregated in the order of their nodes.

        Of nodes with other metrics than most only the update counts. Empty if the total weight is 0, or if the
        metrics do not fit together: that must not end a run.
        """
        contents = [content for _, content in sorted(state.contents, key=lambda c: c[0])]
        usual = Counter(map(_names_of_metrics, contents)).most_common(1)
        contents = [c for c in contents if usual and _names_of_metrics(c) == usual[0][0]]
        try:
            return self.train_metrics_aggr_fn(contents, self.weighted_by_key)
        except (ArithmeticError, LookupError, TypeError, ValueError) as exc:
            log.warning("metrics.left_out: %s: %s", type(exc).__name__, exc)
            return MetricRecord()

    def moved(self, state: Round, total: RoundSum) -> ArrayRecord:
        """The next model: the one that went out, `step` of the way to the mean."""
        step = self.step(state, total)
        if step == 0.0 or not total.total.weight:
            return state.base
        moved = {}
        for mean in total.total.mean():
            if step != 1.0:
                base = state.base[mean.name].numpy()
                array = base + step * (mean.numpy().astype(np.float64) - base)
                mean = Tensor.of(mean.name, np.asarray(array, mean.numpy().dtype))
            moved[mean.name] = flower.array_of(mean)
        return ArrayRecord(moved)


def _names_of_metrics(content: RecordDict) -> frozenset[str]:
    return frozenset(key for metrics in content.metric_records.values() for key in metrics)


def incomplete(message: Message) -> Refusal | None:
    """Why a reply has not one record of metrics and one of arrays, or None."""
    for kind, found in (("metric", message.content.metric_records), ("array", message.content.array_records)):
        if len(found) != 1:
            return Refusal("malformed", f"the reply holds {len(found)} {kind} records, expected one")
    return None


def book(state: Round, message: Message) -> None:
    """Record that a reply counts; its arrays are not kept."""
    light = RecordDict({k: v for k, v in message.content.items() if not isinstance(v, ArrayRecord)})
    state.contents.append((message.metadata.src_node_id, light))


def refused(message: Message, refusal: Refusal) -> None:
    """Log why a reply is refused."""
    node = message.metadata.src_node_id
    log.warning("update.refused node=%s category=%s reason=%s", node, refusal.category, refusal.reason)


def _batches(replies: Iterator[ScoredReply]) -> Iterator[list[ScoredReply]]:
    """Batches of up to _TOGETHER replies; a coded update ends a batch, since it takes memory of its own."""
    batch = []
    for reply in replies:
        batch.append(reply)
        if len(batch) == _TOGETHER or reply.was_coded:
            yield batch
            batch = []
    if batch:
        yield batch
