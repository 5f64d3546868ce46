"""What each command does. Each may run twice; its result comes back as an event."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import asdict
from typing import Any

from fedtide.coordinator.adapters.attesting import Attesting
from fedtide.coordinator.adapters.audit import AuditTrail
from fedtide.coordinator.adapters.director import Director
from fedtide.coordinator.adapters.distribution import Distribution
from fedtide.coordinator.adapters.enrolment import Enroller
from fedtide.coordinator.adapters.notices import Notices
from fedtide.coordinator.adapters.presence import Presence
from fedtide.coordinator.adapters.run_services import RunStreams
from fedtide.coordinator.adapters.starting import Starter
from fedtide.coordinator.commands import (
    AnnouncePresence,
    CacheRelease,
    CancelRun,
    CleanUp,
    Command,
    Fire,
    LaunchAggregator,
    PublishAccount,
    PublishRelease,
    SetAlarm,
    SetDesired,
    SettleNodes,
    StopAggregator,
    StopFired,
    SuspendAggregator,
    TellTimeIsUp,
)
from fedtide.coordinator.launch.launcher import Exit, Launcher
from fedtide.coordinator.log.engine import Engine
from fedtide.coordinator.log.timers import Alarms
from fedtide.coordinator.rollouts import rollouts
from fedtide.coordinator.runs import runs
from fedtide.fabric.encoding import from_json, to_json
from fedtide.fabric.errors import ConfigError, InvalidTransition, MalformedMessage, NotFound
from fedtide.fabric.events.envelope import FiringFailed, NotificationSent, ReleasePublished, decode_event
from fedtide.fabric.events.rollouts import RolloutAbortRequested, RolloutSettled
from fedtide.fabric.events.runs import AggregatorExited, AggregatorWaits, RunCancelRequested, RunCleanedUp
from fedtide.fabric.messages.tasks import Cancel
from fedtide.fabric.messages.usage import Usage
from fedtide.fabric.nats.broker import Broker
from fedtide.fabric.nats.compare_and_set import replace_stored
from fedtide.fabric.nats.subjects import CHECKPOINTS, DOWN, HUB_REGION, UP, OrderFor, Subjects, parse_as
from fedtide.fabric.plans.release import Lineage, ReleaseManifest
from fedtide.fabric.plans.round_policy import TimeIsUp
from fedtide.fabric.plans.trigger_rule import Notify
from fedtide.fabric.process.retry import until_done

log = logging.getLogger(__name__)


class CommandHandlers:
    """A method for each type of command."""

    def __init__(
        self,
        broker: Broker,
        subjects: Subjects,
        engine: Engine,
        launcher: Launcher,
        starter: Starter,
        presence: Presence,
        alarms: Alarms,
        enroller: Enroller | None,
        streams: RunStreams,
        notices: Notices,
        director: Director,
        attesting: Attesting,
        trail: AuditTrail,
    ) -> None:
        self._trail = trail
        self._notices = notices
        self._director = director
        self._attesting = attesting
        self._broker = broker
        self._subjects = subjects
        self._engine = engine
        self._launcher = launcher
        self._starter = starter
        self._presence = presence
        self._alarms = alarms
        self._enroller = enroller
        self._streams = streams
        self._distribution = Distribution(broker, subjects, director)
        self._handlers: Mapping[type, Callable[[Any], Awaitable[None]]] = {
            AnnouncePresence: self._announce_presence,
            CacheRelease: self._cache_release,
            CancelRun: self._cancel_run,
            CleanUp: self._clean_up,
            Fire: self._fire,
            LaunchAggregator: self._launch,
            PublishAccount: self._publish_account,
            PublishRelease: self._publish_release,
            SetAlarm: self._set_alarm,
            SetDesired: self._set_desired,
            SettleNodes: self._settle_nodes,
            StopAggregator: self._stop,
            StopFired: self._stop_fired,
            SuspendAggregator: self._suspend,
            TellTimeIsUp: self._tell_time_is_up,
        }

    async def handle(self, command: Command) -> None:
        """Carry out one command.

        Raises:
            InvalidTransition: it is outdated.
            TransientError, OSError: it may succeed later.
        """
        await self._handlers[type(command)](command)

    async def _announce_presence(self, command: AnnouncePresence) -> None:
        self._presence.changed(command.node)
        await self._broker.tell(self._subjects.presence(command.node), command.state.encode())

    async def _cache_release(self, command: CacheRelease) -> None:
        await self._distribution.cache(command, self._engine)

    async def _set_desired(self, command: SetDesired) -> None:
        if command.node in self._engine.world.nodes:  # else it was removed
            await self._distribution.set_desired(command, self._engine.world)

    async def _settle_nodes(self, command: SettleNodes) -> None:
        world = self._engine.world
        kept = {each.node: each for each in rollouts.kept_states(world.rollout(command.rollout))}
        for node in command.nodes:
            if node in kept and node in world.nodes:  # it may have been taken back, or removed, meanwhile
                await self._distribution.set_desired(kept[node], world)
        await self._engine.submit(RolloutSettled(rollout=command.rollout, nodes=list(command.nodes)))

    async def _cancel_run(self, command: CancelRun) -> None:
        data = RunCancelRequested(run=command.run, reason=command.reason)
        await self._engine.submit(data, id=f"{command.run}.withdrawn")

    async def _set_alarm(self, command: SetAlarm) -> None:
        self._alarms.set(command)

    async def _publish_account(self, _: PublishAccount) -> None:
        if self._enroller is not None:
            self._enroller.accounts_changed()

    async def _launch(self, command: LaunchAggregator) -> None:
        world = self._engine.world
        await self._launcher.launch(command, lambda: runs.is_current(world.run(command.run), command.attempt))

    async def _stop(self, command: StopAggregator) -> None:
        await self._launcher.stop(command.run)
        await self._cancel_tasks(command.run)
        await self._remove_data(command.run, command.life, keeps_checkpoints=True)

    async def _suspend(self, command: SuspendAggregator) -> None:
        if isinstance(self._engine.world.run(command.run), runs.Paused):
            await self._launcher.stop(command.run)
        # An alarm that rang before the pause is void, also if the run was resumed meanwhile: the round has its whole
        # time again. What comes later about this run is carried out later.
        await self._broker.purge(CHECKPOINTS, self._subjects.order(command.run))

    async def _tell_time_is_up(self, command: TellTimeIsUp) -> None:
        order = TimeIsUp(
            round=command.round,
            trial=command.trial,
            phase=command.phase,
            cause=command.cause,
            ends_run=command.ends_run,
        )

        def replaces(stored: bytes) -> bool:
            try:
                found = from_json(TimeIsUp, stored, "order")
            except MalformedMessage:
                return True
            if found == order or found.ends_run:
                return False
            return order.ends_run or (found.round, found.trial) <= (order.round, order.trial)

        subject = self._subjects.order(command.run)
        await replace_stored(self._broker, CHECKPOINTS, subject, to_json(order), replaces)

    async def _clean_up(self, command: CleanUp) -> None:
        await self._remove_data(command.run, command.life, keeps_checkpoints=False)

    async def _fire(self, command: Fire) -> None:
        world, rule, key = self._engine.world, command.rule, command.id
        if not world.is_asked_for(rule.name, key):
            return
        try:
            if isinstance(rule.do, Notify):
                await self._notices.send(command)
                await self._engine.submit(NotificationSent(rule=rule.name, id=key))
                return
            if key in world.runs or key in world.rollouts:
                raise ConfigError(rule.name, f"{key} was started before, for the same event")
            await self._starter.fire(rule, key, command.cause, command.trace)
            await self._audit(command, "started")
        except (ConfigError, NotFound) as exc:
            await self._audit(command, "failed", str(exc))
            await self._engine.submit(FiringFailed(rule=rule.name, id=key, reason=str(exc)))

    async def _audit(self, command: Fire, outcome: str, reason: str = "") -> None:
        """What a rule does nobody asks the API for."""
        await self._trail.append(
            who=f"rule {command.rule.name}",
            via="rule",
            behalf=command.cause[:200],
            action=f"{command.rule.do.kind} {command.id}",
            outcome=outcome,
            reason=reason[:1000],
        )

    async def _stop_fired(self, command: StopFired) -> None:
        world, key, reason = self._engine.world, command.id, "replaced by a newer firing of its trigger"
        if key in world.runs:
            await self._engine.submit(RunCancelRequested(run=key, reason=reason))
        elif key in world.rollouts:
            await self._engine.submit(RolloutAbortRequested(rollout=key, reason=reason))

    async def _cancel_tasks(self, run: str) -> None:
        """Replace every task of the run that is still in the stream by its cancellation."""
        for subject in await self._broker.subjects_of(DOWN, self._subjects.tasks_of(run)):
            cancel = to_json(Cancel(task=parse_as(OrderFor, subject).name, run=run))
            signed = self._director.headers(subject, cancel)
            await self._broker.publish(subject, cancel, ttl_s=3600, headers=signed)

    async def _remove_data(self, run: str, life: int, *, keeps_checkpoints: bool) -> None:
        await self._streams.remove(run, keeps_checkpoints=keeps_checkpoints)
        self._alarms.forget("run", run)
        key = self._enroller.run_key(run, life) if self._enroller is not None else ""
        once = f"{run}.cleaned" if life == 1 else f"{run}.{life}.cleaned"
        await self._engine.submit(RunCleanedUp(run=run, key=key), id=once)

    async def _publish_release(self, command: PublishRelease) -> None:
        produced = command.produced
        run = self._engine.world.run(produced.run)
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
        await self._distribution.keep(produced.run, manifest)
        raw = to_json(manifest)
        attestation = await self._attesting.of_run(produced, manifest, raw)
        ref = await self._distribution.store(raw)
        published = ReleasePublished(release=ref, manifest=manifest, attestation=attestation)
        await self._engine.submit(published, id=f"{produced.run}.released")


class AggregatorReports:
    """Logs what becomes of aggregators, for the launcher."""

    def __init__(self, broker: Broker, subjects: Subjects, engine: Engine) -> None:
        self._broker = broker
        self._subjects = subjects
        self._engine = engine

    async def exited(self, how: Exit) -> None:
        """Log that an aggregator is gone, unless its last report tells how the run ended."""
        run, attempt = how.run, how.attempt
        if await until_done(log, "aggregator.exit_waits", lambda: self._reported_its_end(run, attempt), run=run):
            return
        told = asdict(how)
        exited = AggregatorExited(usage=Usage(cpu_us=told.pop("cpu_us")), **told)
        await self._submit(exited, f"{run}.{attempt}.exited")

    async def waits(self, run: str, attempt: int, reason: str) -> None:
        """Log why an aggregator has not begun yet."""
        await self._submit(AggregatorWaits(run=run, attempt=attempt, reason=reason), None)

    async def _submit(self, data: AggregatorExited | AggregatorWaits, id: str | None) -> None:
        try:
            await self._engine.submit(data, id=id)
        except InvalidTransition as exc:
            log.info("aggregator.report_ignored", extra={"run": data.run, "reason": str(exc)})

    async def _reported_its_end(self, run: str, attempt: int) -> bool:
        # The report may be stored and not yet read by us: look where it would be.
        for kind in ("run-completed", "run-failed"):
            last = await self._broker.last(UP, self._subjects.report(HUB_REGION, run, kind))
            if last is not None and _attempt_in(last.data) == attempt:
                return True
        return False


def _attempt_in(report: bytes) -> int | None:
    try:
        return getattr(decode_event(report).data, "attempt", None)
    except MalformedMessage:
        return None  # somebody else's, or a later version's: then the exit is logged
