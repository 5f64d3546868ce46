"""Carries out commands. Each may run twice; its result comes back as an event."""

from __future__ import annotations

import asyncio
import logging

from fedtide.coordinator.adapters.distribution import Distribution
from fedtide.coordinator.adapters.enrolment import Enroller
from fedtide.coordinator.adapters.starting import Starter
from fedtide.coordinator.commands import (
    AnnouncePresence,
    CacheRelease,
    CancelRun,
    CleanUp,
    Command,
    Commands,
    Fire,
    LaunchAggregator,
    PublishAccount,
    PublishRelease,
    RunCommand,
    SetAlarm,
    SetDesired,
    StopAggregator,
    StopFired,
    SuspendAggregator,
    TellTimeIsUp,
)
from fedtide.coordinator.launch.local import Launcher
from fedtide.coordinator.log.engine import Engine
from fedtide.coordinator.log.timers import Alarms
from fedtide.coordinator.runs import runs
from fedtide.fabric.encoding import to_json
from fedtide.fabric.errors import ConfigError, InvalidTransition, NotFound
from fedtide.fabric.events.envelope import FiringFailed, ReleasePublished, decode_event
from fedtide.fabric.events.rollouts import RolloutAbortRequested
from fedtide.fabric.events.runs import AggregatorExited, RunCancelRequested, RunCleanedUp
from fedtide.fabric.messages.tasks import Cancel
from fedtide.fabric.nats.broker import Broker
from fedtide.fabric.nats.subjects import CHECKPOINTS, DOWN, HUB_REGION, UP, OrderFor, Subjects, parse_as, reply_consumer
from fedtide.fabric.plans.release import Lineage, ReleaseManifest
from fedtide.fabric.plans.round_policy import TimeIsUp
from fedtide.fabric.process.retry import until_done

log = logging.getLogger(__name__)


class Executor:
    """`start` is given to the engine; the tasks it spawns belong to `group`."""

    def __init__(self, broker: Broker, subjects: Subjects, group: asyncio.TaskGroup) -> None:
        self._broker = broker
        self._subjects = subjects
        self._distribution = Distribution(broker, subjects)
        self._group = group
        self._engine: Engine | None = None
        self._launcher: Launcher | None = None
        self._starter: Starter | None = None
        self._enroller: Enroller | None = None
        self._alarms: Alarms | None = None

    def connect(self, engine: Engine, launcher: Launcher, starter: Starter, enroller: Enroller | None = None) -> None:
        """Set what this calls, before anything runs: engine and executor call each other."""
        self._engine = engine
        self._launcher = launcher
        self._starter = starter
        self._enroller = enroller
        self._alarms = Alarms(engine, self._group)

    def start(self, commands: Commands) -> None:
        for command in commands:
            self._group.create_task(self._until_done(command), name=type(command).__name__)

    async def _until_done(self, command: Command) -> None:
        name = type(command).__name__
        try:
            await until_done(log, "command.waits", lambda: self._do(command), command=name)
        except InvalidTransition as exc:
            log.warning("command.outdated", extra={"command": name, "reason": str(exc)})

    async def _do(self, command: Command) -> None:
        assert self._engine is not None and self._alarms is not None
        match command:
            case PublishRelease():
                await self._publish_release(command, self._engine)
            case SetDesired():
                await self._distribution.set_desired(command, self._engine.world)
            case CacheRelease():
                await self._distribution.cache(command, self._engine)
            case CancelRun(run=run, reason=reason):
                await self._engine.submit(RunCancelRequested(run=run, reason=reason), id=f"{run}.withdrawn")
            case SetAlarm():
                self._alarms.set(command)
            case PublishAccount():
                if self._enroller is not None:
                    self._enroller.account_changed()
            case AnnouncePresence(node=node, state=state):
                await self._broker.tell(self._subjects.presence(node), state.encode())
            case Fire() | StopFired():
                await self._do_for_rule(command, self._engine)
            case _:
                await self._do_with_run(command, self._engine)

    async def _do_for_rule(self, command: Fire | StopFired, engine: Engine) -> None:
        if isinstance(command, Fire):
            await self._fire(command)
        else:
            await self._stop_fired(command.id, engine)

    async def _do_with_run(self, command: RunCommand, engine: Engine) -> None:
        assert self._launcher is not None
        match command:
            case LaunchAggregator(run=run, attempt=attempt):
                await self._launcher.launch(command, lambda: runs.is_current(engine.world.run(run), attempt))
            case StopAggregator(run=run):
                await self._launcher.stop(run)
                await self._cancel_tasks(run)
                await self._clean_up(run)
            case SuspendAggregator(run=run):
                if isinstance(engine.world.run(run), runs.Paused):
                    await self._launcher.stop(run)
                    # An alarm that rang before the pause is void: the round has its whole time again.
                    await self._broker.purge(CHECKPOINTS, self._subjects.order(run))
            case TellTimeIsUp(run=run):
                order = TimeIsUp(round=command.round, trial=command.trial, phase=command.phase, cause=command.cause)
                await self._broker.publish(self._subjects.order(run), to_json(order))
            case CleanUp(run=run):
                await self._clean_up(run)

    async def _fire(self, command: Fire) -> None:
        assert self._engine is not None and self._starter is not None
        world, rule, key = self._engine.world, command.rule, command.id
        if not world.is_asked_for(rule.name, key):
            return
        try:
            if key in world.runs or key in world.rollouts:
                raise ConfigError(rule.name, f"{key} was started before, for the same event")
            await self._starter.fire(rule, key, command.cause)
        except (ConfigError, NotFound) as exc:
            await self._engine.submit(FiringFailed(rule=rule.name, id=key, reason=str(exc)))

    async def _stop_fired(self, key: str, engine: Engine) -> None:
        if key in engine.world.runs:
            await engine.submit(RunCancelRequested(run=key, reason="replaced by a newer firing of its trigger"))
        elif key in engine.world.rollouts:
            await engine.submit(RolloutAbortRequested(rollout=key, reason="replaced by a newer firing of its trigger"))

    async def _cancel_tasks(self, run: str) -> None:
        """Replace every task of the run that is still in the stream by its cancellation."""
        for subject in await self._broker.subjects_of(DOWN, self._subjects.all_tasks):
            task = parse_as(OrderFor, subject).name
            if task.startswith(f"{run}-"):
                await self._broker.publish(subject, to_json(Cancel(task=task, run=run)), ttl_s=3600)

    async def _clean_up(self, run: str) -> None:
        await self._broker.delete_consumer(UP, reply_consumer(run))
        await self._broker.purge(CHECKPOINTS, self._subjects.checkpoints(run))
        for pattern in (self._subjects.replies(run), self._subjects.update_blobs(run)):
            await self._broker.purge(UP, pattern)
        await self._broker.purge(DOWN, self._subjects.round_blobs(run))
        assert self._engine is not None and self._alarms is not None
        self._alarms.forget("run", run)
        await self._engine.submit(RunCleanedUp(run=run), id=f"{run}.cleaned")

    async def _publish_release(self, command: PublishRelease, engine: Engine) -> None:
        produced = command.produced
        run = engine.world.run(produced.run)
        manifest = ReleaseManifest(
            model=produced.model,
            version=command.version,
            onnx=produced.onnx,
            parts=produced.parts,
            arrays=produced.arrays,
            smoke=produced.smoke,
            export=produced.export,
            metrics=produced.metrics,
            lineage=Lineage(
                app=run.facts.spec.app,
                run_config=run.facts.spec.run_config,
                run=produced.run,
                rounds=sum(number > 0 for number in run.rounds),
                participants=len(runs.participants(run)),
                updates=runs.accepted_updates(run),
                base=produced.base,
                privacy=produced.privacy,
            ),
        )
        ref = await self._distribution.store(manifest)
        await engine.submit(ReleasePublished(release=ref, manifest=manifest), id=f"{produced.run}.released")

    async def aggregator_exited(
        self, run: str, attempt: int, code: int, reason: str, *, preempted: bool = False
    ) -> None:
        """Log that an aggregator is gone, unless its last report tells how the run ended."""
        assert self._engine is not None
        if await until_done(log, "aggregator.exit_waits", lambda: self._reported_its_end(run, attempt), run=run):
            return
        data = AggregatorExited(run=run, attempt=attempt, code=code, reason=reason, preempted=preempted)
        try:
            await self._engine.submit(data, id=f"{run}.{attempt}.exited")
        except InvalidTransition as exc:
            log.info("aggregator.exit_ignored", extra={"run": run, "reason": str(exc)})

    async def _reported_its_end(self, run: str, attempt: int) -> bool:
        # The report may be stored and not yet read by us: look where it would be.
        for kind in ("run-completed", "run-failed"):
            last = await self._broker.last(UP, self._subjects.report(HUB_REGION, run, kind))
            if last is not None and getattr(decode_event(last.data).data, "attempt", None) == attempt:
                return True
        return False
