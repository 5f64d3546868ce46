"""One phase of a round: sample nodes, store the plan, send, and collect replies, by the run's policy."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

from flwr.app import Message
from flwr.serverapp import strategy as flowers
from flwr.serverapp.strategy import FedXgbBagging, FedXgbCyclic, Strategy

from fedtide.aggregation.folding.in_flight import Node
from fedtide.aggregation.grid.phases import Admission, Folding, Phase
from fedtide.aggregation.grid.replies import Replies
from fedtide.aggregation.rounds import random_state
from fedtide.aggregation.rounds.checkpoints import Checkpoints, Plan, nodes_of
from fedtide.aggregation.rounds.progress import Progress
from fedtide.aggregation.strategies.averaging import FedAvg
from fedtide.aggregation.strategies.bounded import distances
from fedtide.aggregation.sums.admission import Refusal, beyond, inspect
from fedtide.aggregation.sums.round_sum import StreamingUpdate, UpdateNorm
from fedtide.aggregation.sums.staleness import rebase
from fedtide.fabric.errors import ConfigError
from fedtide.fabric.flower import bridge as flower
from fedtide.fabric.messages.tasks import Reply
from fedtide.fabric.plans.round_policy import RoundPolicy, staleness_weight
from fedtide.fabric.tensors.blobs import BlobRef
from fedtide.fabric.tensors.frame import Tensor

_NOT_AVERAGING = (FedXgbBagging, FedXgbCyclic)


class Exchange:
    """Runs one phase. After a crash it sends the same messages to the same nodes as before."""

    def __init__(self, checkpoints: Checkpoints, policy: RoundPolicy) -> None:
        self._checkpoints = checkpoints
        self._policy = policy

    def train(self, progress: Progress) -> tuple[Iterable[Message], list[BlobRef]]:
        """The updates of a round, and the blobs of the model that was sent.

        Raises:
            TooFewUpdates: (also from the iterable) the round has to be tried again.
            ConfigError: the policy needs a strategy that averages, and this one does not.
        """
        if not self._policy.carries:
            return self._phase(progress, "train", progress.strategy.configure_train)
        if not _averages(progress.strategy):
            raise ConfigError(
                f"policy.mode {self._policy.mode}",
                f"{type(progress.strategy).__name__} does not average models: there is nothing to discount",
                "Use mode sync, or a strategy that averages",
            )
        messages = self._messages(progress, "train", progress.strategy.configure_train)
        progress.bases[progress.round] = progress.arrays
        counted = progress.grid.collect_carried(messages)
        for each in counted:
            asked_in = each.asked.place.round
            age = progress.round - asked_in
            if age:
                base = progress.bases[asked_in]
                rebase(each.message, base, progress.arrays, staleness_weight(self._policy, age))
        still_out = {asked.place.round for asked in progress.grid.outstanding().values()}
        progress.bases = {number: base for number, base in progress.bases.items() if number in still_out}
        return sorted((c.message for c in counted), key=_by_node), []

    def evaluate(self, progress: Progress) -> Iterable[Message]:
        """The nodes' evaluations of the current model."""
        return self._phase(progress, "evaluate", progress.strategy.configure_evaluate)[0]

    def _phase(
        self, progress: Progress, phase: str, configure: Callable[..., Iterable[Message]]
    ) -> tuple[Iterable[Message], list[BlobRef]]:
        # Nodes that still train for a later round are skipped: they would delay an evaluation.
        messages = progress.grid.to_free_nodes(self._messages(progress, phase, configure))
        replies = progress.grid.send_and_receive(messages, timeout=progress.timeout)
        streams = isinstance(progress.strategy, FedAvg) and _averages(progress.strategy)
        if phase == "train" and streams and isinstance(replies, Replies):
            return replies.once(), progress.grid.model_blob()
        # flwr's own strategies make a list of all replies anyway: sorting it costs nothing, and the same
        # updates give the same bytes whatever arrived first.
        return sorted(replies, key=_by_node), progress.grid.model_blob()

    def _messages(
        self, progress: Progress, phase: str, configure: Callable[..., Iterable[Message]]
    ) -> Iterable[Message]:
        number, trial, grid = progress.round, progress.trial, progress.grid
        plan = self._checkpoints.plan(number, trial, phase)
        if plan is not None:
            random_state.restore(plan.random)
        state = random_state.capture()

        def remember(choice: list[Node]) -> None:
            if plan is None:
                nodes = [(n.name, n.region) for n in choice]
                codecs = {n.name: sorted(n.codecs) for n in choice if n.codecs}
                self._checkpoints.save_plan(
                    Plan(round=number, trial=trial, phase=phase, nodes=nodes, random=state, codecs=codecs)
                )

        averaged = phase == "train" and _averages(progress.strategy)
        admission = self._admission(progress) if averaged else None
        pinned = nodes_of(plan) if plan is not None else None
        folding = self._folding(progress) if averaged and not self._policy.carries else None
        grid.enter(Phase(number, trial, phase, admission, pinned, remember, folding))
        return configure(number, progress.arrays, progress.configs[phase], grid)

    def _admission(self, progress: Progress) -> Admission:
        strategy, sent, limit = progress.strategy, flower.tensors_of(progress.arrays), self._policy.max_update_norm
        whole = strategy.admit if isinstance(strategy, FedAvg) and not self._policy.carries else None

        def admit(message: Message) -> Refusal | None:
            refusal = whole(message) if whole is not None else _inspect(strategy, sent, message)
            if refusal is None and limit is not None:
                (record,) = message.content.array_records.values()
                refusal = beyond(math.sqrt(distances(sent, flower.tensors_of(record))[0]), limit)
            return refusal

        return admit

    def _folding(self, progress: Progress) -> Folding | None:
        """How the strategy folds updates while they arrive, if it does."""
        strategy, limit = progress.strategy, self._policy.max_update_norm
        if not isinstance(strategy, FedAvg) or not strategy.supports_streaming:
            return None
        base = flower.tensors_of(progress.arrays)

        def expect(reply: Reply, frame_bytes: int) -> StreamingUpdate | Refusal:
            # The whole message must decode before any of the update is folded.
            metrics = list(flower.from_wire(reply.message, None).content.metric_records.values())
            if len(metrics) != 1:
                return Refusal("malformed", f"the reply holds {len(metrics)} metric records, expected one")
            incoming = strategy.expect(reply.task, metrics[0], frame_bytes)
            if limit is not None and isinstance(incoming, StreamingUpdate):
                incoming.reach = UpdateNorm(base, limit)
            return incoming

        return Folding(expect, lambda: strategy.collecting().sum)


def _by_node(message: Message) -> int:
    return message.metadata.src_node_id


def _averages(strategy: Strategy) -> bool:
    """Whether known code (flwr's or ours) sends the global arrays and averages the replies."""
    inner: Any = getattr(strategy, "strategy", strategy)  # the DP wrappers hold the strategy they wrap
    if not isinstance(inner, flowers.FedAvg) or isinstance(inner, _NOT_AVERAGING):
        return False
    methods = (type(inner).configure_train, type(inner).aggregate_train)
    return all(m.__module__.startswith(("flwr.", "fedtide.aggregation.strategies.")) for m in methods)


def _inspect(strategy: Strategy, sent: list[Tensor], message: Message) -> Refusal | None:
    records = list(message.content.array_records.values())
    if len(records) != 1:
        return Refusal("wrong_shape", f"the reply holds {len(records)} array records, expected one")
    if isinstance(strategy, FedAvg):
        weights = [strategy.weight_of(m) for m in message.content.metric_records.values()]
        if len(weights) != 1:
            return Refusal("malformed", f"the reply holds {len(weights)} metric records, expected one")
        if isinstance(weights[0], Refusal):
            return weights[0]
    return inspect(sent, flower.tensors_of(records[0]))
