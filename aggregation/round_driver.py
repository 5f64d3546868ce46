"""The loop of `Strategy.start` as it runs in our aggregator: Flower's behaviour, reported and resumable.

Same calls in the same order and the same Result as flwr's own loop. Beside it each round is
reported, updates are admitted before they are averaged, a run may start from a release's arrays,
and after each round there is a checkpoint: a killed aggregator's successor goes on in the same
round, with the updates that were delivered meanwhile, and asks no node again.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg, FedXgbBagging, FedXgbCyclic, Result, Strategy
from pydantic import ValidationError

from aggregation import random_state
from aggregation.admission import Refusal, inspect
from aggregation.checkpoints import Checkpoints, Head, Plan, nodes_of
from aggregation.config import WorkerConfig
from aggregation.grid_link import GridLink
from aggregation.in_flight import Node
from aggregation.nats_grid import NatsGrid, Phase
from fabric import flower
from fabric.blobs import BlobRef
from fabric.errors import ConfigError, FedtideError
from fabric.events import RoundClosed, UpdateRefused
from fabric.subjects import Subjects
from fabric.tensors import Tensor
from fabric.wire import Reply

log = logging.getLogger(__name__)

EvaluateFn = Callable[[int, ArrayRecord], MetricRecord | None]
_NOT_AVERAGING = (FedXgbBagging, FedXgbCyclic)


class NothingLearned(FedtideError):
    """Rounds were run, and none of them brought an update that counts."""


@dataclass
class Progress:
    """A `strategy.start` under way."""

    strategy: Strategy
    grid: NatsGrid
    arrays: ArrayRecord
    timeout: float
    configs: dict[str, ConfigRecord]
    evaluate_fn: EvaluateFn | None
    result: Result = field(default_factory=Result)
    round: int = 0
    rounds_with_updates: int = 0


class RoundDriver:
    """Drives the rounds of one run; `arrays` is the global model after the last one."""

    def __init__(self, config: WorkerConfig, link: GridLink, base: ArrayRecord | None) -> None:
        self._config = config
        self._link = link
        self._base = base
        self._checkpoints = Checkpoints(config.run, link, Subjects(config.tenant))
        self._started = False
        self._progress: Progress | None = None
        self.metrics: dict[str, float] = {}

    @property
    def arrays(self) -> ArrayRecord | None:
        return self._progress.arrays if self._progress is not None else None

    def check(self) -> None:
        """Raises NothingLearned if this driver drove rounds and no update was ever averaged."""
        if self._progress is not None and self._progress.round and not self._progress.rounds_with_updates:
            raise NothingLearned(
                f"no update was accepted in {self._progress.round} rounds",
                "`fedtide run show` lists why each was refused",
            )

    def install(self) -> None:
        """Make the `strategy.start(...)` of this process ours."""
        driver, original = self, Strategy.start

        def start(
            strategy: Strategy,
            grid: Grid,
            initial_arrays: ArrayRecord,
            num_rounds: int = 3,
            timeout: float = 3600,
            train_config: ConfigRecord | None = None,
            evaluate_config: ConfigRecord | None = None,
            evaluate_fn: EvaluateFn | None = None,
        ) -> Result:
            if not isinstance(grid, NatsGrid) or driver._started:
                # A wrapped grid, or a second strategy in one main: flwr's own loop, without checkpoints.
                return original(
                    strategy, grid, initial_arrays, num_rounds, timeout, train_config, evaluate_config, evaluate_fn
                )
            driver._started = True
            configs = {"train": train_config or ConfigRecord(), "evaluate": evaluate_config or ConfigRecord()}
            arrays = driver._starting_point(initial_arrays)
            progress = Progress(strategy, grid, arrays, timeout, configs, evaluate_fn)
            try:
                return driver._drive(progress, driver._config.spec.rounds or num_rounds)
            finally:
                grid.leave()

        Strategy.start = start  # type: ignore[method-assign, assignment]

    def _drive(self, progress: Progress, rounds: int) -> Result:
        self._progress = progress
        progress.strategy.summary()
        head = self._checkpoints.head()
        if head is not None:
            self._resume(progress, head)
        else:
            self._evaluate_here(progress, 0.0)
            # Also before the first round: an app may draw other initial arrays when it is started again.
            self._save(progress)
        while progress.round < rounds:
            progress.round += 1
            log.info("round.opened", extra={"round": progress.round, "of": rounds})
            self._round(progress)
        return progress.result

    def _resume(self, progress: Progress, head: Head) -> None:
        progress.arrays = self._checkpoints.restore(head, progress.result, progress.strategy)
        progress.round, progress.rounds_with_updates = head.round, head.rounds_with_updates
        if head.rounds_with_updates:
            progress.result.arrays = progress.arrays
        self.metrics = _metrics(progress.result, head.round)
        log.info("run.resumed", extra={"after_round": head.round})

    def _round(self, progress: Progress) -> None:
        began = time.monotonic()
        number, strategy, result = progress.round, progress.strategy, progress.result
        replies, sent = self._exchange(progress, "train", strategy.configure_train)
        arrays, metrics = strategy.aggregate_train(number, replies)
        if arrays is not None:
            progress.rounds_with_updates += 1
            progress.arrays = result.arrays = arrays
        if metrics is not None:
            result.train_metrics_clientapp[number] = metrics
        replies, _ = self._exchange(progress, "evaluate", strategy.configure_evaluate)
        if (metrics := strategy.aggregate_evaluate(number, replies)) is not None:
            result.evaluate_metrics_clientapp[number] = metrics
        self._evaluate_here(progress, time.monotonic() - began)
        self._close(progress, sent)

    def _exchange(
        self, progress: Progress, phase: str, configure: Callable[..., Iterable[Message]]
    ) -> tuple[Iterable[Message], list[BlobRef]]:
        """Send one phase's messages; the same ones to the same nodes as before a crash, if there was one."""
        number, grid = progress.round, progress.grid
        plan = self._checkpoints.plan(number, phase)
        if plan is not None:
            random_state.restore(plan.random)
        state = random_state.capture()

        def remember(choice: list[Node]) -> None:
            if plan is None:
                nodes = [(n.name, n.region) for n in choice]
                self._checkpoints.save_plan(Plan(round=number, phase=phase, nodes=nodes, random=state))

        averaged = phase == "train" and _averages(progress.strategy)
        admission = _admission(flower.tensors_of(progress.arrays)) if averaged else None
        grid.enter(Phase(number, phase, admission, nodes_of(plan) if plan is not None else None, remember))
        messages = configure(number, progress.arrays, progress.configs[phase], grid)
        replies = grid.send_and_receive(messages, timeout=progress.timeout)
        return _in_order(progress.strategy, replies), grid.model_blob()

    def _evaluate_here(self, progress: Progress, seconds: float) -> None:
        if progress.evaluate_fn and (metrics := progress.evaluate_fn(progress.round, progress.arrays)) is not None:
            progress.result.evaluate_metrics_serverapp[progress.round] = metrics
        self.metrics = _metrics(progress.result, progress.round)
        if progress.round or self.metrics:
            self._report_closed(progress.round, seconds)

    def _report_closed(self, number: int, seconds: float) -> None:
        run, attempt = self._config.run, self._config.attempt
        closed = RoundClosed(run=run, attempt=attempt, round=number, metrics=self.metrics, seconds=seconds)
        self._link.call(self._link.report(closed))

    def _close(self, progress: Progress, sent: list[BlobRef]) -> None:
        """Checkpoint first; only then may the round's updates and model be forgotten."""
        head = self._save(progress)
        for raw in self._link.call(self._link.close_round()):
            self._report_late(raw)
        self._link.call(self._link.forget_updates())
        for blob in sent:
            if blob != head.arrays.blob:
                self._link.call(self._link.forget_blob(blob))

    def _report_late(self, raw: bytes) -> None:
        """An answer to a task that was given up, or to a round that is over: counted, never averaged."""
        try:
            reply = Reply.model_validate_json(raw)
        except ValidationError as exc:
            log.warning("round.late_reply_malformed", extra={"reason": str(exc)})
            return
        late = UpdateRefused(
            run=self._config.run,
            attempt=self._config.attempt,
            round=int(reply.message.group_id or 0),
            phase=reply.message.message_type,
            node=reply.node,
            category="late",
            reason="arrived after its task had been given up",
        )
        self._link.call(self._link.report(late))

    def _save(self, progress: Progress) -> Head:
        return self._checkpoints.save_head(
            progress.round, progress.arrays, progress.rounds_with_updates, progress.result, progress.strategy
        )

    def _starting_point(self, initial: ArrayRecord) -> ArrayRecord:
        if self._base is None:
            return initial
        refusal = inspect(flower.tensors_of(initial), flower.tensors_of(self._base))
        if refusal is not None:
            raise ConfigError("--base", f"the release does not fit this app: {refusal.reason}")
        return self._base


def _in_order(strategy: Strategy, replies: Iterable[Message]) -> Iterable[Message]:
    """Replies as they come for strategies that stream; else by node, so that a float sum has one order.

    flwr's own strategies make a list of all replies anyway: sorting it costs nothing, and the
    same updates give the same bytes whatever arrived first.
    """
    if getattr(strategy, "streams_replies", False):
        return replies
    return sorted(replies, key=lambda m: m.metadata.src_node_id)


def _metrics(result: Result, number: int) -> dict[str, float]:
    """The numbers of one round, named by their origin (lists are left out)."""
    metrics: dict[str, float] = {}
    for prefix, history in (
        ("train_", result.train_metrics_clientapp),
        ("eval_", result.evaluate_metrics_clientapp),
        ("", result.evaluate_metrics_serverapp),
    ):
        record = history.get(number, MetricRecord())
        metrics |= {f"{prefix}{k}": float(v) for k, v in record.items() if isinstance(v, int | float)}
    return metrics


def _averages(strategy: Strategy) -> bool:
    """Whether flwr's own code sends the global arrays and averages what comes back."""
    inner: Any = getattr(strategy, "strategy", strategy)  # the DP wrappers hold the strategy they wrap
    if not isinstance(inner, FedAvg) or isinstance(inner, _NOT_AVERAGING):
        return False
    methods = (type(inner).configure_train, type(inner).aggregate_train)
    return all(m.__module__.startswith("flwr.") for m in methods)


def _admission(sent: list[Tensor]) -> Callable[[Message], Refusal | None]:
    def admit(message: Message) -> Refusal | None:
        records = list(message.content.array_records.values())
        if len(records) != 1:
            return Refusal("wrong_shape", f"the reply holds {len(records)} array records, expected one")
        return inspect(sent, flower.tensors_of(records[0]))

    return admit
