"""One phase of a round: sample nodes, store the plan, send, and collect replies, by the run's policy."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeGuard, TypeVar

from flwr.app import ArrayRecord, Message, MetricRecord
from flwr.serverapp import strategy as flowers
from flwr.serverapp.strategy import FedXgbBagging, FedXgbCyclic, Strategy

from fedtide.aggregation.folding.in_flight import Node
from fedtide.aggregation.grid.phases import Admission, Folding, Phase
from fedtide.aggregation.rounds import random_state
from fedtide.aggregation.rounds.agreement_of_replies import Shapes, has_weight, misshapen, refuse_odd_replies, shapes_of
from fedtide.aggregation.rounds.checkpoints import Checkpoints, Plan, nodes_of
from fedtide.aggregation.rounds.progress import Progress
from fedtide.aggregation.strategies.averaging import FedAvg
from fedtide.aggregation.strategies.bounded import distances
from fedtide.aggregation.sums.admission import Refusal, beyond, poison
from fedtide.aggregation.sums.round_sum import StreamingUpdate, UpdateNorm
from fedtide.aggregation.sums.staleness import rebase
from fedtide.fabric.errors import ConfigError
from fedtide.fabric.flower import bridge as flower
from fedtide.fabric.messages.tasks import Reply
from fedtide.fabric.plans.round_policy import RoundPolicy, staleness_weight
from fedtide.fabric.tensors.blobs import BlobRef
from fedtide.fabric.tensors.frame import Tensor

T = TypeVar("T")
_NOT_AVERAGING = (FedXgbBagging, FedXgbCyclic)


class Exchange:
    """Runs one phase. After a crash it sends the same messages to the same nodes as before."""

    def __init__(self, checkpoints: Checkpoints, policy: RoundPolicy) -> None:
        self._checkpoints = checkpoints
        self._policy = policy
        self._progress: Progress | None = None
        self._replies: Sequence[Message] = ()
        """Of the training phase under way."""
        if policy.admission == "lenient":
            refuse_odd_replies(self._refuse, self._sent, lambda: self._replies)

    def _sent(self) -> Shapes | None:
        return shapes_of(self._progress.arrays) if self._progress is not None else None

    def _refuse(self, reply: Message, refusal: Refusal) -> Message:
        assert self._progress is not None
        return self._progress.grid.refuse(reply, refusal)

    def train(self, progress: Progress) -> tuple[ArrayRecord | None, MetricRecord | None, list[BlobRef]]:
        """What the strategy makes of the updates of a round, and the blobs of the model that was sent.

        Raises:
            TooFewUpdates: the round has to be tried again.
            ConfigError: the policy needs a strategy that averages, and this one does not.
        """
        replies, sent = self._updates(progress)
        none: tuple[ArrayRecord | None, MetricRecord | None] = (None, None)
        arrays, metrics = self._aggregated(progress, progress.strategy.aggregate_train, replies, none)
        return arrays, metrics, sent

    def evaluate(self, progress: Progress) -> MetricRecord | None:
        """What the strategy makes of the nodes' evaluations of the current model."""
        replies, _ = self._phase(progress, "evaluate", progress.strategy.configure_evaluate)
        return self._aggregated(progress, progress.strategy.aggregate_evaluate, replies, None)

    def _aggregated(
        self, progress: Progress, aggregate: Callable[[int, Iterable[Message]], T], replies: Iterable[Message], none: T
    ) -> T:
        try:
            found = aggregate(progress.round, replies)
        except ZeroDivisionError:
            inner = _inner(progress.strategy)
            answers = [r for r in replies if r.has_content()] if isinstance(replies, list) else []
            if self._policy.admission == "off" or not answers or not isinstance(inner, flowers.FedAvg):
                raise
            if any(has_weight(reply, inner.weighted_by_key) for reply in answers):
                raise
            for reply in answers:
                self._refuse(reply, Refusal("bad_weight", "the weights of all answers are 0"))
            found = none
        self._progress, self._replies = None, ()
        progress.grid.check_rest()
        return found

    def _updates(self, progress: Progress) -> tuple[Iterable[Message], list[BlobRef]]:
        if not self._policy.carries:
            return self._phase(progress, "train", progress.strategy.configure_train)
        if not _averages(progress.strategy):
            raise ConfigError(
                f"policy.mode {self._policy.mode}",
                f"{type(progress.strategy).__name__} does not average models: there is nothing to discount",
                "Use mode sync, or a strategy that averages",
            )
        messages = self._messages(progress, "train", progress.strategy.configure_train)
        progress.bases[progress.place] = progress.arrays
        counted = progress.grid.collect_carried(messages)
        for each in counted:
            asked_in = each.asked.place.round
            age = progress.place - asked_in
            if age:
                base = progress.bases[asked_in]
                rebase(each.message, base, progress.arrays, staleness_weight(self._policy, age))
        still_out = {asked.place.round for asked in progress.grid.outstanding().values()}
        progress.bases = {number: base for number, base in progress.bases.items() if number in still_out}
        return self._in_shape(progress, sorted((c.message for c in counted), key=_by_node)), []

    def _phase(
        self, progress: Progress, phase: str, configure: Callable[..., Iterable[Message]]
    ) -> tuple[Iterable[Message], list[BlobRef]]:
        # Nodes that still train for a later round are skipped: they would delay an evaluation.
        messages = progress.grid.to_free_nodes(self._messages(progress, phase, configure))
        replies = progress.grid.stream(messages, progress.timeout)
        if phase == "train" and _streams(progress.strategy):
            return replies, progress.grid.model_blob()
        # Whoever is no strategy of ours may count and index what it gets. Sorted, the same updates give the same
        # bytes whatever arrived first.
        found = self._replies = sorted(replies, key=_by_node)
        return self._in_shape(progress, found) if phase == "train" else found, progress.grid.model_blob()

    def _in_shape(self, progress: Progress, replies: Sequence[Message]) -> list[Message]:
        """The replies to a strategy of ours; those whose arrays have other shapes than most are refused.

        In Flower's strategies that is looked at where they average (`refuse_odd_replies`): an app's own strategy may
        take arrays of any shapes.
        """
        model = self._sent()
        looks = self._policy.admission == "lenient" and isinstance(_inner(progress.strategy), FedAvg)
        wrong = misshapen(replies, model) if looks and model is not None else {}
        return [self._refuse(r, wrong[n]) if n in wrong else r for n, r in enumerate(replies)]

    def _messages(
        self, progress: Progress, phase: str, configure: Callable[..., Iterable[Message]]
    ) -> Iterable[Message]:
        number, trial, grid = progress.place, progress.trial, progress.grid
        self._progress = progress
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

        admission = self._admission(progress) if phase == "train" else None
        pinned = nodes_of(plan) if plan is not None else None
        folding = self._folding(progress) if phase == "train" and not self._policy.carries else None
        grid.enter(Phase(number, trial, phase, admission, pinned, remember, folding))
        return configure(progress.round, progress.arrays, progress.configs[phase], grid)

    def _admission(self, progress: Progress) -> Admission:
        strategy, limit = progress.strategy, self._policy.max_update_norm
        whole = strategy.admit if _streams(strategy) and not self._policy.carries else None

        def admit(asked: Message, reply: Message) -> Refusal | None:
            refusal = None
            if whole is not None:
                refusal = whole(reply)
            elif self._policy.admission == "lenient":
                refusal = poison(_tensors(asked), list(_tensors(reply).values()))
            if refusal is None and limit is not None:
                refusal = _too_far(asked, reply, limit)
            return refusal

        return admit

    def _folding(self, progress: Progress) -> Folding | None:
        """How the strategy folds updates while they arrive, if it does."""
        strategy, limit = progress.strategy, self._policy.max_update_norm
        if not _streams(strategy) or not strategy.supports_streaming:
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


def _inner(strategy: Strategy) -> Any:
    return getattr(strategy, "strategy", strategy)  # the DP wrappers hold the strategy they wrap


def _averages(strategy: Strategy) -> bool:
    """Whether the strategy averages models: one of flwr's or ours, or what an app made of it."""
    inner = _inner(strategy)
    return isinstance(inner, flowers.FedAvg) and not isinstance(inner, _NOT_AVERAGING)


def _streams(strategy: Strategy) -> TypeGuard[FedAvg]:
    """Whether updates may go into the strategy's sum while they arrive: an app's own methods want to see them."""
    if not isinstance(strategy, FedAvg):
        return False
    methods = (type(strategy).configure_train, type(strategy).aggregate_train)
    return all(m.__module__.startswith("fedtide.aggregation.strategies.") for m in methods)


def _tensors(message: Message) -> dict[str, Tensor]:
    """All arrays of a message, by name."""
    return {t.name: t for record in message.content.array_records.values() for t in flower.tensors_of(record)}


def _too_far(asked: Message, reply: Message, limit: float) -> Refusal | None:
    sent, returned = _tensors(asked), _tensors(reply)
    for name, tensor in returned.items():
        if name not in sent or sent[name].shape != tensor.shape:
            return Refusal("wrong_shape", f"tensor {name!r} is not in the model that max_update_norm compares with")
    base = [t for name, t in sent.items() if name in returned]
    return beyond(math.sqrt(distances(base, list(returned.values()))[0]), limit)
