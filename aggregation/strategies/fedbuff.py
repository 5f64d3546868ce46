"""FedBuff: a round closes when enough updates have arrived, without waiting for slow nodes.

Nguyen et al. 2022, https://arxiv.org/abs/2106.06639. An update that was trained from the model of s rounds ago
counts with (1 + s) ** -exponent. Under our Grid the run's policy does this, durably, for any strategy
that averages (`--policy mode=async,buffer=K`); this class does it under Flower's own Grid.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result

from fedtide.aggregation.strategies.averaging import FedAvg, ScoredReply, incomplete, refused
from fedtide.aggregation.sums.admission import Refusal, inspect
from fedtide.aggregation.sums.staleness import rebase
from fedtide.fabric.errors import MalformedMessage
from fedtide.fabric.flower import bridge as flower

log = logging.getLogger(__name__)

_POLL_S = 0.2

EvaluateFn = Callable[[int, ArrayRecord], MetricRecord | None]


class FedBuff(FedAvg):
    """`start` keeps every node busy, and makes a model of every `buffer` updates."""

    def __init__(
        self, *args: Any, buffer: int = 10, max_staleness: int = 10, exponent: float = 0.5, **kwargs: Any
    ) -> None:
        """
        Args:
            buffer: K; updates a round.
            max_staleness: older updates do not count.
            exponent: of the discount for staleness.
        """
        super().__init__(*args, **kwargs)
        if buffer < 1 or max_staleness < 0 or exponent < 0:
            raise ValueError("expected buffer >= 1, max_staleness >= 0 and exponent >= 0")
        self.buffer = buffer
        self.max_staleness = max_staleness
        self.exponent = exponent

    def start(
        self,
        grid: Grid,
        initial_arrays: ArrayRecord,
        num_rounds: int = 3,
        timeout: float = 3600,
        train_config: ConfigRecord | None = None,
        evaluate_config: ConfigRecord | None = None,
        evaluate_fn: EvaluateFn | None = None,
    ) -> Result:
        """As Flower's, but nodes only train; a round is `buffer` updates, for which it waits `timeout` seconds."""
        if getattr(grid, "carries", False):
            return super().start(grid, initial_arrays, num_rounds, timeout, train_config, evaluate_config, evaluate_fn)
        result, config = Result(), train_config or ConfigRecord()
        result.arrays = initial_arrays
        out: dict[str, tuple[int, int]] = {}
        bases = {1: initial_arrays}
        for round_ in range(1, num_rounds + 1):
            bases[round_] = result.arrays
            replies = self._collect(round_, bases, config, grid, out, timeout)
            arrays, metrics = self.aggregate_train(round_, replies)
            if arrays is not None:
                result.arrays = arrays
            if metrics is not None:
                result.train_metrics_clientapp[round_] = metrics
            if evaluate_fn and (found := evaluate_fn(round_, result.arrays)) is not None:
                result.evaluate_metrics_serverapp[round_] = found
            still_out = {sent_in for sent_in, _ in out.values()}
            bases = {number: base for number, base in bases.items() if number in still_out}
        return result

    def _rebased(self, message: Message, age: int, base: ArrayRecord, present: ArrayRecord) -> bool:
        """Whether a reply may count; if so, its arrays are rebased to the current model."""
        if message.has_error() or age > self.max_staleness or incomplete(message) is not None:
            return False
        try:
            update = ScoredReply.of(message, base).update
        except MalformedMessage as exc:
            refused(message, Refusal("malformed", str(exc)))
            return False
        if (refusal := inspect(flower.tensors_of(base), update)) is not None:
            refused(message, refusal)
            return False
        (name,) = message.content.array_records
        message.content[name] = ArrayRecord({t.name: flower.array_of(t) for t in update})
        if age:
            rebase(message, base, present, (1.0 + age) ** -self.exponent)
        return True

    def _collect(
        self,
        round_: int,
        bases: dict[int, ArrayRecord],
        config: ConfigRecord,
        grid: Grid,
        out: dict[str, tuple[int, int]],
        timeout: float,
    ) -> list[Message]:
        """Send to idle nodes, and collect `buffer` updates; `out`: (round, node) of every open task."""
        present = bases[round_]
        content = {m.metadata.dst_node_id: m for m in self.configure_train(round_, present, config, grid)}
        ready: list[Message] = []
        until = time.monotonic() + timeout
        while len(ready) < self.buffer and time.monotonic() < until:
            busy = {node for _, node in out.values()}
            free = [
                Message(m.content, node, m.metadata.message_type) for node, m in content.items() if node not in busy
            ]
            keys = grid.push_messages(free)
            out |= {key: (round_, m.metadata.dst_node_id) for key, m in zip(keys, free, strict=True)}
            counting = len(ready)
            for message in list(grid.pull_messages(list(out))):
                sent_in, _ = out.pop(message.metadata.reply_to_message_id)
                if self._rebased(message, round_ - sent_in, bases[sent_in], present):
                    ready.append(message)
            if len(ready) == counting:
                time.sleep(_POLL_S)  # Flower's Grid has no way to wait
        return ready
