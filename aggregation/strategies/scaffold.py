"""SCAFFOLD: control variates correct the drift of each node's local steps (client drift).

Karimireddy et al. 2020, https://arxiv.org/abs/1910.06378, algorithm 1 with option II. The node's half is
`fedtide.edge_agent.training.scaffold.ScaffoldMod`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid

from fedtide.aggregation.strategies.averaging import MAX_UPDATES, FedAvg, refused
from fedtide.aggregation.sums.admission import Refusal, inspect
from fedtide.aggregation.sums.agreement import Agreement
from fedtide.aggregation.sums.round_sum import RoundSum, Weight
from fedtide.fabric.flower import bridge as flower
from fedtide.fabric.messages.scaffold import CHANGE, CONTROL
from fedtide.fabric.tensors.frame import Tensor

log = logging.getLogger(__name__)


class Scaffold(FedAvg):
    """Nodes need `ScaffoldMod`, and state that is kept between tasks.

    Attributes:
        control: c of the paper, by tensor; None before the first round.
        nodes: N; all nodes that may take part.
    """

    supports_streaming = False
    of_one_round = ("round", "_changes", "_summed")

    def __init__(self, *args: Any, nodes: int | None = None, **kwargs: Any) -> None:
        """
        Args:
            nodes: N of the paper; None: as many as the largest round asked.
        """
        super().__init__(*args, **kwargs)
        self.control: dict[str, Any] | None = None
        self._all_nodes = nodes or 0
        self.nodes = self._all_nodes
        self._changes: dict[int, list[Tensor]] = {}
        self._summed: RoundSum | None = None

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        floats = {k: a.numpy() for k, a in arrays.items() if a.numpy().dtype.kind == "f"}
        if self.control is None:
            self.control = {k: np.zeros_like(v) for k, v in floats.items()}
        control = [Tensor.of(k, v) for k, v in self.control.items()]
        record = ArrayRecord({t.name: flower.array_of(t) for t in control})
        messages = list(super().configure_train(server_round, arrays, config, grid))
        for message in messages:
            message.content = RecordDict({**message.content, CONTROL: record})
        self.nodes = self._all_nodes or max(self.nodes, len(messages))
        self._changes = {}
        self._summed = RoundSum(Agreement.of(control, max(MAX_UPDATES, len(messages))))
        return messages

    def admit(self, message: Message) -> Refusal | None:
        return self._set_aside(message) or super().admit(message)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        found = super().aggregate_train(server_round, self._without_changes(replies))
        # Weighted like the updates: otherwise c would belong to another objective than the model.
        weights = {
            node: self.weight_of(next(iter(c.metric_records.values()))) for node, c in self.collecting().contents
        }
        counted = {node: weight for node, weight in weights.items() if isinstance(weight, Weight)}
        self._move_control([self._changes[node] for node in counted], list(counted.values()))
        return found

    def _without_changes(self, replies: Iterable[Message]) -> Iterator[Message]:
        """Replies in the form that FedAvg takes; replies without the record of `ScaffoldMod` are refused."""
        for message in replies:
            aside = message.metadata.src_node_id in self._changes
            refusal = None if message.has_error() or aside else self._set_aside(message)
            if refusal is None:
                yield message
            else:
                refused(message, refusal)

    def _set_aside(self, message: Message) -> Refusal | None:
        change = message.content.array_records.get(CHANGE)
        if change is None:
            return Refusal("malformed", f"the reply holds no record {CHANGE!r}: its app needs ScaffoldMod")
        assert self.control is not None
        tensors = flower.tensors_of(change)
        refusal = inspect([Tensor.of(k, v) for k, v in self.control.items()], tensors)
        if refusal is None:
            self._changes[message.metadata.src_node_id] = tensors
            del message.content[CHANGE]
        return refusal

    def _move_control(self, changes: list[list[Tensor]], weights: list[Weight]) -> None:
        total, control = self._summed, self.control
        assert total is not None
        assert control is not None
        for refusal in total.add(changes, weights):
            if refusal is not None:
                log.warning("scaffold.change_left_out: %s", refusal.reason)
        if not total.share:
            return
        share = len(total) / self.nodes
        for mean in total.total.mean():
            before = control[mean.name]
            control[mean.name] = np.asarray(before + share * mean.numpy().astype(np.float64), before.dtype)
