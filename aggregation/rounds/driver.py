"""The loop of `Strategy.start` as it runs in our aggregator: Flower's behaviour, reported and resumable.

Same calls in the same order and the same Result as flwr's own loop. Beside it each round is
reported, updates are admitted before they are averaged, a run may start from a release's arrays,
and after each round there is a checkpoint: a killed aggregator's successor goes on in the same
round, with the updates that were delivered meanwhile, and asks no node again. A round in which
too few answer is tried again with a new selection; a stop rule may end the run early.

An app may start one strategy after the other: each is a stage with checkpoints of its own, and the rounds of
the run are counted through.
"""

from __future__ import annotations

import functools
import inspect as signatures
import logging
import time
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord
from flwr.serverapp.strategy import Result, Strategy

from fedtide.aggregation.config import WorkerConfig
from fedtide.aggregation.folding.in_flight import Arrived
from fedtide.aggregation.grid.nats_grid import NatsGrid
from fedtide.aggregation.grid.phases import TooFewUpdates
from fedtide.aggregation.grid.round_reports import Accounts
from fedtide.aggregation.link.grid_link import GridLink
from fedtide.aggregation.link.phase_id import place_of
from fedtide.aggregation.rounds import flower_lines, privacy_ledger
from fedtide.aggregation.rounds.checkpoints import Checkpoints, RoundCheckpoint
from fedtide.aggregation.rounds.exchange import Exchange
from fedtide.aggregation.rounds.progress import HISTORIES, Best, Progress
from fedtide.aggregation.rounds.spilled_history import SpilledHistory
from fedtide.aggregation.sums.admission import inspect
from fedtide.fabric.encoding import from_json
from fedtide.fabric.errors import ConfigError, FedtideError, MalformedMessage
from fedtide.fabric.flower import bridge as flower
from fedtide.fabric.messages.tasks import Reply
from fedtide.fabric.nats.subjects import Subjects
from fedtide.fabric.plans.release import Privacy
from fedtide.fabric.plans.round_policy import best_round, resolved, why_stop
from fedtide.fabric.tensors.blobs import BlobRef

log = logging.getLogger(__name__)


class NothingLearned(FedtideError):
    """The rounds of a run accepted no update, or brought no evaluation."""


class RoundGivenUp(FedtideError):
    """A round was abandoned and has no retries left."""


class RunEnds(Exception):
    """The run is completed without the round under way."""


class RoundDriver:
    """Drives the rounds of one run."""

    def __init__(self, config: WorkerConfig, link: GridLink, accounts: Accounts, base: ArrayRecord | None) -> None:
        self._config = config
        self._link = link
        self._accounts = accounts
        self._base = base
        self._checkpoints = Checkpoints(config.run, link, Subjects(config.tenant))
        self._exchange = Exchange(self._checkpoints, config.spec.policy)
        self._stages: list[Progress] = []
        self._undriven: Result | None = None
        self._stopped = ""
        self._kept: set[BlobRef] = set()
        """Models that the last checkpoint names."""

    @property
    def drives(self) -> bool:
        """Whether the app has started a strategy on our grid."""
        return bool(self._stages)

    @property
    def _last(self) -> Progress | None:
        return self._stages[-1] if self._stages else None

    @property
    def arrays(self) -> ArrayRecord | None:
        """The model to release: the best one by a stop rule with patience, else the last."""
        if self._undriven is not None:
            return self._undriven.arrays
        if self._last is None:
            return None
        return self._last.best.arrays if self._last.best is not None else self._last.arrays

    @property
    def note(self) -> str:
        """Why the run ended early, and which round's model is released if that is not the last one."""
        notes = [self._stopped]
        last = self._last
        if last is not None and last.best is not None and last.best.round != last.round:
            notes.append(f"the release is that of round {last.before + last.best.round}, the best one")
        return "; ".join(note for note in notes if note)

    @property
    def trained(self) -> bool:
        """Whether the model is another one than in the beginning."""
        return self._undriven is not None or any(stage.rounds_with_updates for stage in self._stages)

    @property
    def metrics(self) -> dict[str, float]:
        """Of the model to release."""
        last = self._last
        if last is None:
            return {}
        return last.metrics(last.best.round if last.best is not None else last.round)

    def privacy(self, before: Privacy | None) -> Privacy | None:
        """The model's privacy ledger, if its epsilon is bounded; `before`: the ledger of the base release."""
        ledger = before if self._stages else None
        for number, stage in enumerate(self._stages):
            if number and ledger is None:
                return None
            ledger = privacy_ledger.ledger(ledger, self._config.run, stage.strategy)
        return ledger

    @property
    def _trains(self) -> bool:
        return self._config.spec.purpose == "train"

    def check(self) -> None:
        """Raises NothingLearned if the rounds accepted no update, or brought no evaluation."""
        if not self._trains and not self.metrics:
            raise NothingLearned("no node evaluated the release", "`fedtide run show` lists why each did not")
        if self._trains and any(stage.asked_to_train for stage in self._stages) and not self.trained:
            rounds = sum(stage.round for stage in self._stages)
            raise NothingLearned(
                f"no update was accepted in {rounds} rounds", "`fedtide run show` lists why each was refused"
            )

    def install(self) -> None:
        """Replace `Strategy.start` in this process by this driver."""
        driver, original = self, Strategy.start
        form = signatures.signature(original)

        @functools.wraps(original)
        def start(strategy: Strategy, *args: Any, **kwargs: Any) -> Result:
            given = form.bind(strategy, *args, **kwargs)
            given.apply_defaults()
            asked = dict(given.arguments)
            own = {name: asked.pop(name) for name in _DRIVEN}
            more = sorted(n for n, value in asked.items() if n != "self" and value != form.parameters[n].default)
            if type(own["grid"]) is not NatsGrid or "send_and_receive" in vars(own["grid"]) or more:
                log.warning("run.not_resumable", extra={"why": f"start({', '.join(more)})" if more else "another grid"})
                driver._undriven = original(strategy, *args, **kwargs)
                return driver._undriven
            return driver._start(strategy, **own)

        Strategy.start = start  # type: ignore[method-assign, assignment]

    def _start(
        self,
        strategy: Strategy,
        grid: NatsGrid,
        initial_arrays: ArrayRecord,
        num_rounds: int,
        timeout: float,
        train_config: ConfigRecord | None,
        evaluate_config: ConfigRecord | None,
        evaluate_fn: Any,
    ) -> Result:
        self._undriven = None
        number, before = len(self._stages) + 1, sum(stage.last_round for stage in self._stages)
        configs = {"train": train_config or ConfigRecord(), "evaluate": evaluate_config or ConfigRecord()}
        arrays = self._starting_point(initial_arrays) if number == 1 else initial_arrays
        rounds = (self._config.spec.rounds or num_rounds) if self._trains else 1
        progress = Progress(strategy, grid, arrays, timeout, configs, evaluate_fn, rounds, number, before)
        for name in HISTORIES:
            file = self._config.work_dir / "histories" / f"{number}-{name}"
            file.unlink(missing_ok=True)
            setattr(progress.result, name, SpilledHistory(file))
        self._stages.append(progress)
        try:
            return self._drive(progress)
        finally:
            grid.leave()

    def _drive(self, progress: Progress) -> Result:
        privacy_ledger.check(progress.strategy)
        flower_lines.begins(progress)
        began = time.monotonic()
        head = self._checkpoints.head(progress.stage)
        if head is not None:
            self._resume(progress, head)
        else:
            if self._config.spec.policy.down:
                progress.anchor = progress.arrays
                progress.grid.code_against(progress.anchor)
            self._evaluate_here(progress, 0.0)
            # Also before the first round: a restarted app may draw different initial arrays.
            self._save(progress)
        while progress.round < progress.last_round and not self._is_enough(progress):
            progress.round += 1
            mark = self._checkpoints.mark(progress.place)
            progress.trial = mark.trial if mark is not None else 1
            log.info("round.opened", extra={"round": progress.round, "of": progress.last_round})
            try:
                self._round(progress)
            except RunEnds:
                self._checkpoints.restore_strategy_of(progress)
                progress.round -= 1
        flower_lines.ends(progress.result, progress.round, time.monotonic() - began)
        progress.grid.finish()
        return progress.result

    def _resume(self, progress: Progress, head: RoundCheckpoint) -> None:
        self._checkpoints.restore(head, progress)
        self._kept = head.models()
        if progress.anchor is not None:
            progress.grid.code_against(progress.anchor)
        if head.rounds_with_updates:
            progress.result.arrays = progress.arrays
        following = progress.place + 1
        mark = self._checkpoints.mark(following)
        tasks = {t.task: t for t in [*head.outstanding, *(mark.outstanding if mark is not None else ())]}
        for task in tasks.values():
            base = progress.arrays if task.round == following else progress.bases.get(task.round)
            progress.grid.adopt(task.task, task.node, task.round, task.expires_at, base)
        log.info("run.resumed", extra={"after_round": progress.place})

    def _is_enough(self, progress: Progress) -> bool:
        if self._link.run_ends:
            self._stopped = f"stopped by a person after round {progress.place}"
            return True
        rule = self._config.spec.stop
        if rule is None or not progress.round:
            return False
        moved = progress.bytes_before + self._accounts.bytes_moved
        reason = why_stop(resolved(rule, progress.series), progress.series, moved)
        self._stopped = f"stopped after round {progress.place} of {progress.before + progress.last_round}: {reason}"
        if not reason:
            self._stopped = ""
        return reason is not None

    def _judge(self, progress: Progress) -> None:
        """Take in the numbers of the round that ends, and remember the best one by the run's stop rule.

        Raises:
            ConfigError: there is no such metric.
        """
        number, rule = progress.round, self._config.spec.stop
        progress.series.append((number, progress.metrics(number)))
        if rule is None or not rule.metric:
            return
        known = resolved(rule, progress.series)
        names = sorted({name for _, metrics in progress.series for name in metrics})
        evaluated = not progress.evaluate_fn or number in progress.result.evaluate_metrics_serverapp
        if known.metric not in names and evaluated and self._evaluates(progress) and number:
            there = f"After round {number} there are: {', '.join(names)}"
            raise ConfigError("--stop metric", f"there is no metric {rule.metric!r}", there)
        trained = [(n, metrics) for n, metrics in progress.series if n]
        if rule.patience is not None and number and best_round(known, trained) == number:
            progress.best = Best(number, progress.arrays)

    def _evaluates(self, progress: Progress) -> bool:
        """Whether nodes evaluate in this round."""
        return progress.round % self._config.spec.policy.evaluate_every == 0 or progress.round == progress.last_round

    def _round(self, progress: Progress) -> None:
        while True:
            flower_lines.round_begins(progress)
            try:
                self._try_round(progress)
                return
            except TooFewUpdates as exc:
                self._abandon(progress, exc)

    def _try_round(self, progress: Progress) -> None:
        began = time.monotonic()
        number, result = progress.round, progress.result
        sent = self._train(progress) if self._trains else []
        if self._evaluates(progress) and (metrics := self._exchange.evaluate(progress)) is not None:
            flower_lines.aggregated(metrics)
            result.evaluate_metrics_clientapp[number] = metrics
        if not self._trains:
            result.arrays = progress.arrays
        self._evaluate_here(progress, time.monotonic() - began)
        self._close(progress, sent)

    def _train(self, progress: Progress) -> list[BlobRef]:
        number, result = progress.round, progress.result
        arrays, metrics, sent = self._exchange.train(progress)
        progress.asked_to_train |= progress.grid.has_asked
        if arrays is not None:
            progress.rounds_with_updates += 1
            progress.arrays = result.arrays = arrays
        if metrics is not None:
            flower_lines.aggregated(metrics)
            result.train_metrics_clientapp[number] = metrics
        return sent

    def _abandon(self, progress: Progress, why: TooFewUpdates) -> None:
        """Undo what the trial changed; the next trial asks other nodes.

        If the policy carries updates, the next trial counts those that arrived; else they are dropped.
        """
        number, trial, policy = progress.place, progress.trial, self._config.spec.policy
        self._accounts.abandoned(number, trial, why.what)
        if self._link.run_ends:
            raise RunEnds from why
        is_last = trial > policy.retries or why.hopeless
        if not is_last:
            progress.trial += 1
            self._checkpoints.save_mark(progress)
        if not policy.carries:
            self._link.call(self._link.close_round(progress.grid.counted, carries=False))
            progress.grid.counted.clear()
        if is_last:
            times = "once" if trial == 1 else f"{trial} times"
            raise RoundGivenUp(
                f"round {number} was abandoned {times}, because {why.what}",
                why.remedy or "`fedtide run show` lists why each answer was refused",
            )
        self._checkpoints.restore_strategy_of(progress)

    def _evaluate_here(self, progress: Progress, seconds: float) -> None:
        number = progress.round
        if progress.evaluate_fn:
            metrics = progress.evaluate_fn(number, progress.arrays)
            flower_lines.evaluated_here(number, metrics)
            if metrics is not None:
                progress.result.evaluate_metrics_serverapp[number] = metrics
        self._judge(progress)
        found = progress.metrics(number)
        if number or (found and not progress.before):
            self._accounts.closed(progress.place, found, seconds)

    def _close(self, progress: Progress, sent: list[BlobRef]) -> None:
        """Store the checkpoint first, and only then delete the round's updates and model."""
        head = self._save(progress)
        carries = self._config.spec.policy.carries
        for raw in self._link.call(self._link.close_round(progress.grid.counted, carries=carries)):
            self._report_late(raw)
        progress.grid.counted.clear()
        self._checkpoints.forget({*sent, *self._kept} - head.models())
        self._kept = head.models()

    def _report_late(self, raw: bytes) -> None:
        """Report a reply to a task that was given up, or to a closed round: counted as late, never averaged."""
        try:
            reply = from_json(Reply, raw, "reply")
        except MalformedMessage as exc:
            log.warning("round.late_reply_malformed", extra={"reason": str(exc)})
            return
        place = place_of(reply.task, self._config.run)
        if place is not None:
            self._accounts.refused(
                place, reply.node, "late", "arrived after its task had been given up", Arrived("", reply)
            )

    def _save(self, progress: Progress) -> RoundCheckpoint:
        moved = progress.bytes_before + self._accounts.bytes_moved
        return self._checkpoints.save_head(progress, moved)

    def _starting_point(self, initial: ArrayRecord) -> ArrayRecord:
        if self._base is None or not initial:
            return self._base or initial
        refusal = inspect(flower.tensors_of(initial), flower.tensors_of(self._base))
        if refusal is not None:
            raise ConfigError("--base", f"the release does not fit this app: {refusal.reason}")
        return self._base


_DRIVEN = ("grid", "initial_arrays", "num_rounds", "timeout", "train_config", "evaluate_config", "evaluate_fn")
"""What `Strategy.start` is given, as far as this driver knows it."""
