"""The loop of `Strategy.start` as it runs in our aggregator: Flower's behaviour, reported and resumable.

Same calls in the same order and the same Result as flwr's own loop. Beside it each round is
reported, updates are admitted before they are averaged, a run may start from a release's arrays,
and after each round there is a checkpoint: a killed aggregator's successor goes on in the same
round, with the updates that were delivered meanwhile, and asks no node again. A round in which
too few answer is tried again with a new selection; a stop rule may end the run early.
"""

from __future__ import annotations

import logging
import time

from flwr.app import ArrayRecord, ConfigRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy

from fedtide.aggregation.config import WorkerConfig
from fedtide.aggregation.grid.nats_grid import NatsGrid
from fedtide.aggregation.grid.outgoing import place_of
from fedtide.aggregation.grid.phases import TooFewUpdates
from fedtide.aggregation.grid.round_reports import Accounts
from fedtide.aggregation.link.grid_link import GridLink
from fedtide.aggregation.rounds import privacy_ledger
from fedtide.aggregation.rounds.checkpoints import Checkpoints, RoundCheckpoint
from fedtide.aggregation.rounds.exchange import Exchange
from fedtide.aggregation.rounds.progress import EvaluateFn, Progress
from fedtide.aggregation.sums.admission import inspect
from fedtide.fabric.encoding import from_json
from fedtide.fabric.errors import ConfigError, FedtideError, MalformedMessage
from fedtide.fabric.flower import bridge as flower
from fedtide.fabric.messages.tasks import Reply
from fedtide.fabric.nats.subjects import Subjects
from fedtide.fabric.plans.release import Privacy
from fedtide.fabric.plans.round_policy import StopRule, why_stop
from fedtide.fabric.tensors.blobs import BlobRef

log = logging.getLogger(__name__)


class NothingLearned(FedtideError):
    """The rounds of a run accepted no update, or brought no evaluation."""


class RoundGivenUp(FedtideError):
    """A round was abandoned and has no retries left."""


class RoundDriver:
    """Drives the rounds of one run; `arrays` is the global model after the last one, `note` says why it ended early."""

    def __init__(self, config: WorkerConfig, link: GridLink, accounts: Accounts, base: ArrayRecord | None) -> None:
        self._config = config
        self._link = link
        self._accounts = accounts
        self._base = base
        self._checkpoints = Checkpoints(config.run, link, Subjects(config.tenant))
        self._exchange = Exchange(self._checkpoints, config.spec.policy)
        self._started = False
        self._progress: Progress | None = None
        self.note = ""

    @property
    def arrays(self) -> ArrayRecord | None:
        return self._progress.arrays if self._progress is not None else None

    def privacy(self, before: Privacy | None) -> Privacy | None:
        """The model's privacy ledger, if its epsilon is bounded; `before`: the ledger of the base release."""
        progress = self._progress
        if progress is None:
            return None
        return privacy_ledger.ledger(before, self._config.run, progress.strategy)

    @property
    def metrics(self) -> dict[str, float]:
        return self._progress.metrics(self._progress.round) if self._progress is not None else {}

    @property
    def _trains(self) -> bool:
        return self._config.spec.purpose == "train"

    def check(self) -> None:
        """Raises NothingLearned if the rounds accepted no update, or brought no evaluation."""
        progress = self._progress
        if not self._trains and not self.metrics:
            raise NothingLearned("no node evaluated the release", "`fedtide run show` lists why each did not")
        if self._trains and progress is not None and progress.round and not progress.rounds_with_updates:
            raise NothingLearned(
                f"no update was accepted in {progress.round} rounds", "`fedtide run show` lists why each was refused"
            )

    def install(self) -> None:
        """Replace `Strategy.start` in this process by this driver."""
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
            rounds = (driver._config.spec.rounds or num_rounds) if driver._trains else 1
            progress = Progress(strategy, grid, arrays, timeout, configs, evaluate_fn, rounds)
            try:
                return driver._drive(progress)
            finally:
                grid.leave()

        Strategy.start = start  # type: ignore[method-assign, assignment]

    def _drive(self, progress: Progress) -> Result:
        self._progress = progress
        privacy_ledger.check(progress.strategy)
        progress.strategy.summary()
        head = self._checkpoints.head()
        if head is not None:
            self._resume(progress, head)
        else:
            if self._config.spec.policy.down:
                progress.anchor = progress.arrays
                # Before the head, which stores the same blob with a TTL of one day only.
                progress.grid.code_against(progress.anchor)
            self._evaluate_here(progress, 0.0)
            # Also before the first round: a restarted app may draw different initial arrays.
            self._save(progress)
        while progress.round < progress.last_round and not self._is_enough(progress):
            progress.round += 1
            mark = self._checkpoints.mark(progress.round)
            progress.trial = mark.trial if mark is not None else 1
            log.info("round.opened", extra={"round": progress.round, "of": progress.last_round})
            self._round(progress)
        progress.grid.finish()
        return progress.result

    def _resume(self, progress: Progress, head: RoundCheckpoint) -> None:
        self._checkpoints.restore(head, progress)
        if progress.anchor is not None:
            progress.grid.code_against(progress.anchor)
        if head.rounds_with_updates:
            progress.result.arrays = progress.arrays
        mark = self._checkpoints.mark(head.round + 1)
        tasks = {t.task: t for t in [*head.outstanding, *(mark.outstanding if mark is not None else ())]}
        for task in tasks.values():
            base = progress.arrays if task.round == head.round + 1 else progress.bases.get(task.round)
            progress.grid.adopt(task.task, task.node, task.round, task.expires_at, base)
        log.info("run.resumed", extra={"after_round": head.round})

    def _is_enough(self, progress: Progress) -> bool:
        rule: StopRule | None = self._config.spec.stop
        moved = progress.bytes_before + self._accounts.bytes_moved
        reason = why_stop(rule, progress.history(), moved) if rule is not None and progress.round else None
        self.note = f"stopped after round {progress.round} of {progress.last_round}: {reason}" if reason else ""
        return reason is not None

    def _round(self, progress: Progress) -> None:
        while True:
            try:
                self._try_round(progress)
                return
            except TooFewUpdates as exc:
                self._abandon(progress, exc)

    def _try_round(self, progress: Progress) -> None:
        began = time.monotonic()
        number, result = progress.round, progress.result
        sent = self._train(progress) if self._trains else []
        every = self._config.spec.policy.evaluate_every
        if number % every == 0 or number == progress.last_round:
            replies = self._exchange.evaluate(progress)
            if (metrics := progress.strategy.aggregate_evaluate(number, replies)) is not None:
                result.evaluate_metrics_clientapp[number] = metrics
        if not self._trains:
            result.arrays = progress.arrays
        self._evaluate_here(progress, time.monotonic() - began)
        self._close(progress, sent)

    def _train(self, progress: Progress) -> list[BlobRef]:
        number, result = progress.round, progress.result
        replies, sent = self._exchange.train(progress)
        arrays, metrics = progress.strategy.aggregate_train(number, replies)
        if arrays is not None:
            progress.rounds_with_updates += 1
            progress.arrays = result.arrays = arrays
        if metrics is not None:
            result.train_metrics_clientapp[number] = metrics
        return sent

    def _abandon(self, progress: Progress, why: TooFewUpdates) -> None:
        """Undo what the trial changed; the next trial asks other nodes.

        If the policy carries updates, the next trial counts those that arrived; else they are dropped.
        """
        number, trial, policy = progress.round, progress.trial, self._config.spec.policy
        self._accounts.abandoned(number, trial, why.what)
        if trial <= policy.retries:
            progress.trial += 1
            self._checkpoints.save_mark(progress)
        if not policy.carries:
            self._link.call(self._link.close_round(progress.grid.counted, carries=False))
            progress.grid.counted.clear()
        if trial > policy.retries:
            raise RoundGivenUp(
                f"round {number} was abandoned {trial} times, the last time because {why.what}",
                "`fedtide run show` lists why each answer was refused",
            )
        head = self._checkpoints.head()
        if head is not None:
            self._checkpoints.restore_strategy(head, progress.strategy)

    def _evaluate_here(self, progress: Progress, seconds: float) -> None:
        if progress.evaluate_fn and (metrics := progress.evaluate_fn(progress.round, progress.arrays)) is not None:
            progress.result.evaluate_metrics_serverapp[progress.round] = metrics
        if progress.round or self.metrics:
            self._accounts.closed(progress.round, self.metrics, seconds)

    def _close(self, progress: Progress, sent: list[BlobRef]) -> None:
        """Store the checkpoint first, and only then delete the round's updates and model."""
        head = self._save(progress)
        carries = self._config.spec.policy.carries
        for raw in self._link.call(self._link.close_round(progress.grid.counted, carries=carries)):
            self._report_late(raw)
        progress.grid.counted.clear()
        for blob in sent:
            if blob != head.arrays.blob:
                self._link.call(self._link.storage.forget_blob(blob))

    def _report_late(self, raw: bytes) -> None:
        """Report a reply to a task that was given up, or to a closed round: counted as late, never averaged."""
        try:
            reply = from_json(Reply, raw, "reply")
        except MalformedMessage as exc:
            log.warning("round.late_reply_malformed", extra={"reason": str(exc)})
            return
        place = place_of(reply.task, self._config.run)
        if place is not None:
            self._accounts.refused(place, reply.node, "late", "arrived after its task had been given up")

    def _save(self, progress: Progress) -> RoundCheckpoint:
        moved = progress.bytes_before + self._accounts.bytes_moved
        return self._checkpoints.save_head(progress, moved)

    def _starting_point(self, initial: ArrayRecord) -> ArrayRecord:
        if self._base is None:
            return initial
        refusal = inspect(flower.tensors_of(initial), flower.tensors_of(self._base))
        if refusal is not None:
            raise ConfigError("--base", f"the release does not fit this app: {refusal.reason}")
        return self._base
