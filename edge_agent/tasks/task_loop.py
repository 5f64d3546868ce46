"""The agent's task loop: orders in, one training task at a time, answers out through the outbox."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from contextlib import suppress
from pathlib import Path

from fedtide.edge_agent.config import AgentConfig
from fedtide.edge_agent.fleet_clock import FleetClock
from fedtide.edge_agent.identity.capabilities import machine_timezone
from fedtide.edge_agent.identity.cluster_node import ClusterView
from fedtide.edge_agent.identity.node_config import node_config
from fedtide.edge_agent.identity.node_trust import NodeTrust
from fedtide.edge_agent.owner_policy import Owner, OwnerRefuses
from fedtide.edge_agent.samples.source import SAMPLES
from fedtide.edge_agent.samples.store import samples_file
from fedtide.edge_agent.sandbox.levels import Level
from fedtide.edge_agent.tasks import node_folders
from fedtide.edge_agent.tasks.app_logs import app_log_file
from fedtide.edge_agent.tasks.app_packages import AppPackages
from fedtide.edge_agent.tasks.app_places import AppPlaces
from fedtide.edge_agent.tasks.fair_queue import FairQueue
from fedtide.edge_agent.tasks.governor import Governor, Latency
from fedtide.edge_agent.tasks.node_meter import NodeMeter
from fedtide.edge_agent.tasks.outbox import Outbox
from fedtide.edge_agent.tasks.trainer import Trainer, TrainerCrashed
from fedtide.edge_agent.training.job import STATE, Job
from fedtide.fabric.encoding import from_json, to_json
from fedtide.fabric.errors import CapabilityMissing, FedtideError, MalformedMessage, TransientError
from fedtide.fabric.flower.apps import unpack
from fedtide.fabric.ids import flower_int, unguessable
from fedtide.fabric.messages.tasks import Cancel, Reply, Task, WireError, WireMessage
from fedtide.fabric.messages.usage import Usage
from fedtide.fabric.nats.broker import Broker
from fedtide.fabric.nats.subjects import DOWN, STAY, UP, Subjects
from fedtide.fabric.nats.transfer import FileSink, Source, get_blob, put_blob, read_blob
from fedtide.fabric.process.files import is_full, map_file, write_atomically
from fedtide.fabric.process.retry import Backoff, until_done
from fedtide.fabric.strict import ConfigValues
from fedtide.fabric.tensors.blobs import BlobRef
from fedtide.fabric.trace_context import TraceContext, current, within
from fedtide.fabric.trust.refusals import Untrusted

log = logging.getLogger(__name__)

_LOAD_FAILED = 1
_APP_CRASHED = 8
TIDY_EVERY_S = 3600.0


class TaskLoop:
    """Owns the trainer and the outbox of a node. `run` and `send` are to be run as two tasks."""

    def __init__(
        self,
        config: AgentConfig,
        broker: Broker,
        latency: Latency,
        clock: FleetClock,
        cluster: ClusterView,
        meter: NodeMeter,
        level: Level,
        trust: NodeTrust,
    ) -> None:
        """`level`: what apps are kept in here."""
        self._trust = trust
        self._meter = meter
        self._clock = clock
        self._cluster = cluster
        self._config = config
        self._broker = broker
        self._subjects = Subjects(config.tenant)
        self._outbox = Outbox(config.data_dir / "outbox", config.data_dir / "runs")
        self._downloads = config.data_dir / "downloads"
        zone = config.timezone or machine_timezone()
        packages = AppPackages(config, self._fetch_of_app, self._show_stage)
        self._places, self._owner, self._level = AppPlaces(config, level), Owner(config.policy_file), level
        governor = Governor(config.limits, zone, latency, self._show_stage, lambda: self._owner.why_not_now(zone))
        self._trainer = Trainer(config, governor, packages, self._places, level)
        self._queue = FairQueue()
        self._queued = asyncio.Event()
        self._accepted: set[str] = set()
        self._traces: dict[str, TraceContext] = {}
        self._cancelled: set[str] = set()
        self._to_send: asyncio.Queue[str] = asyncio.Queue()
        self._running: asyncio.Task[Reply] | None = None
        self.busy: str | None = None
        self.stage = ""
        self.changed = asyncio.Event()
        """Set when `busy` or `stage` changes."""
        for task in self._outbox.waiting():
            self._to_send.put_nowait(task)
        self._tidied = -TIDY_EVERY_S
        self._tidy()

    @property
    def trainer_bytes(self) -> int:
        """Resident memory of what trains."""
        return self._trainer.resident_bytes

    async def order(self, order: Task | Cancel) -> None:
        """Accept a task, once for any number of deliveries; or cancel one, at any stage."""
        if isinstance(order, Cancel):
            await self._cancel(order.task)
        elif order.task not in self._accepted and not self._outbox.knows(order.task):
            self._accepted.add(order.task)
            if (trace := current()) is not None:
                self._traces[order.task] = trace
            self._queue.put(order)
            self._queued.set()

    async def _cancel(self, task: str) -> None:
        if task not in self._accepted:
            if not self._outbox.knows(task):
                self._outbox.drop(task)  # a reply that waits is still sent: late, not lost
            return
        self._cancelled.add(task)
        if self.busy == task and self._running is not None:
            self._running.cancel()

    async def run(self) -> None:
        """Process tasks for ever; on cancellation the trainer is stopped."""
        try:
            while True:
                task = self._queue.take()
                if task is not None:
                    with within(self._traces.pop(task.task, None)):
                        await self._one(task)
                    continue
                self._queued.clear()
                await self._queued.wait()
        finally:
            await self._trainer.stop()

    async def _one(self, task: Task) -> None:
        key = task.task
        self._meter.task_begins(self._used_before(task))
        try:
            if self._clock.now() > task.expires_at:
                return  # expired; a resumed run sends a new task
            if key in self._cancelled:
                self._outbox.drop(key)
                return
            self._show(key, "downloading")
            self._running = asyncio.create_task(self._train(task), name=f"train-{key}")
            reply = await self._running
            await self._commit(reply)
            self._forget_progress(task)
            self._to_send.put_nowait(key)
        except asyncio.CancelledError:
            if key not in self._cancelled:
                self._keep_used(task)
                raise
            self._outbox.drop(key)
            self._forget_progress(task)
            self._meter.task_was_cancelled()
            log.info("task.cancelled", extra={"task": key})
        finally:
            self._running = None
            self._meter.task_ends()
            self._show(None, "")
            self._accepted.discard(key)
            self._cancelled.discard(key)
            self._tidy()

    def _tidy(self) -> None:
        """Now and then: an agent runs for months."""
        if time.monotonic() >= self._tidied + TIDY_EVERY_S:
            self._tidied = time.monotonic()
            node_folders.tidy(self._config.data_dir)

    def _show_stage(self, stage: str) -> None:
        self._show(self.busy, stage)

    def _show(self, task: str | None, stage: str) -> None:
        self.busy, self.stage = task, stage
        self.changed.set()

    async def _commit(self, reply: Reply) -> None:
        """Store the reply on disk, retrying while the disk is full."""

        async def store() -> None:
            self._outbox.commit(reply)

        await until_done(log, "outbox.cannot_store", store, on=OSError, task=reply.task)

    async def _train(self, task: Task) -> Reply:
        began = time.monotonic()
        out_dir = self._outbox.folder(task.task)
        opened, backoff = False, Backoff()
        while True:
            try:
                if not opened:
                    self._outbox.open(task.task)
                    opened = True
                message = await self._answered(task, out_dir)
                break
            except TransientError as exc:
                log.warning("task.waits", extra={"task": task.task, "reason": str(exc)})
                await backoff.wait()
            except (CapabilityMissing, OwnerRefuses, Untrusted) as exc:
                log.warning("task.refused", extra={"task": task.task, "reason": str(exc)})
                if isinstance(exc, OwnerRefuses):
                    await self._trust.refused("app", "owner", task.app.name, exc.what)
                message = _error(task, _LOAD_FAILED, str(exc))
                break
            except FedtideError as exc:
                message = _error(task, _APP_CRASHED, str(exc))
                break
            except OSError as exc:
                if is_full(exc):
                    log.error("task.waits_for_disk", extra={"task": task.task, "reason": str(exc)})
                    await backoff.wait()
                    continue
                message = _error(task, _APP_CRASHED, f"the node's disk: {exc}")
                break
            except Exception as exc:  # an app may leave anything: its task fails, and the node goes on
                log.exception("task.failed", extra={"task": task.task})
                message = _error(task, _APP_CRASHED, f"{type(exc).__name__}: {exc}")
                break
        return Reply(
            task=task.task,
            run=task.run,
            node=self._config.node,
            seconds=time.monotonic() - began,
            stays=task.stay,
            usage=self._meter.of_task(),
            message=message,
        )

    async def _answered(self, task: Task, out_dir: Path) -> WireMessage:
        """The reply of the trainer; a killed one is restarted as long as each gets further than the last."""
        while True:
            saved = self._how_far(task)
            try:
                return await self._answer(task, out_dir)
            except TrainerCrashed as exc:
                if self._how_far(task) == saved:
                    raise
                log.warning("task.goes_on", extra={"task": task.task, "reason": str(exc)})

    async def _answer(self, task: Task, out_dir: Path) -> WireMessage:
        publishers = await self._trust.app(task.app)
        rule = self._owner.policy().rule_for(task.app, self._level, publishers)
        app_dir = self._config.data_dir / "apps" / task.app.bundle.digest
        if not app_dir.exists():
            unpack(bytes(await read_blob(self._source, self._subjects.blob, task.app.bundle)), app_dir)
            node_folders.forget_apps(self._config.data_dir)
        os.utime(app_dir)
        places, node = self._places.of_task(task.run, task.task), self._node_config()
        # What goes down again first: while it is downloaded there is nothing to tidy.
        files = {ref.digest: await self._download(task.run, ref) for ref in task.message.blobs()}
        confined = self._level != "none"
        confinement = self._places.confinement(task.run, task.app, rule, node) if confined else None
        places.open()
        task_file = places.given / "task.json"
        task_file.write_bytes(to_json(task))
        state = self._outbox.state_of(task.run)
        job = Job(
            run=task.run,
            task_file=task_file,
            log_file=app_log_file(self._config.data_dir, task.run).resolve(),
            blobs={digest: places.give(digest, file) for digest, file in files.items()},
            app_dir=app_dir.resolve(),
            work_dir=(self._places.work / task.run).resolve(),
            state_file=places.give(STATE, state) if state.exists() else places.given / STATE,
            progress_file=self._places.progress(task.run, task.task),
            out_dir=places.out,
            node_id=flower_int(self._config.node),
            node_config=node,
            checkpoint_s=self._config.train_checkpoint_s,
            confinement=confinement,
            threads=self._config.train_threads or 0,
            processes=rule.processes,
        )
        job.progress_file.parent.mkdir(parents=True, exist_ok=True)
        self._show(task.task, "training")
        log.info("task.training", extra={"task": task.task})
        await self._trainer.train(job, task.app, rule)
        kept = {ref.digest for ref in task.message.bases()}
        for digest in kept:
            files[digest].touch()
        node_folders.forget_downloads(self._config.data_dir)
        for path in (path for digest, path in files.items() if digest not in kept):
            path.unlink(missing_ok=True)
        message = from_json(WireMessage, places.take_message(out_dir), "message.json")
        for name in {ref.digest for ref in message.blobs()} | ({STATE} if (places.out / STATE).exists() else set()):
            places.take(name, out_dir)
        return message

    def _forget_progress(self, task: Task) -> None:
        progress = self._places.progress(task.run, task.task)
        for file in (progress, self._used_file(task), *progress.parent.glob(f"{task.task}.*.part")):
            file.unlink(missing_ok=True)
        self._places.of_task(task.run, task.task).close()

    def _used_file(self, task: Task) -> Path:
        return self._places.jobs / task.run / f"{task.task}.used"

    def _used_before(self, task: Task) -> Usage:
        """What a task took under an agent that was stopped before it was done."""
        try:
            return from_json(Usage, self._used_file(task).read_bytes(), "usage")
        except (OSError, MalformedMessage):
            return Usage()

    def _keep_used(self, task: Task) -> None:
        """For the next agent. Without room for it the bill is too low, and nothing else is wrong."""
        file = self._used_file(task)
        with suppress(OSError):
            file.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(file, to_json(self._meter.of_task()))

    def _how_far(self, task: Task) -> int:
        """A number that changes whenever the task's trainer saves a checkpoint."""
        try:
            return self._places.progress(task.run, task.task).stat().st_mtime_ns
        except FileNotFoundError:
            return 0

    def _node_config(self) -> ConfigValues:
        """Flower's node config, and the path of this node's sample store."""
        told = node_config(self._config, self._cluster.now)
        if not self._config.capture.share:
            return told
        return {SAMPLES: str(samples_file(self._config.data_dir).resolve()), **told}

    async def _download(self, run: str, ref: BlobRef) -> Path:
        """Download a blob to a file; resumes an interrupted download, also after a restart."""
        self._downloads.mkdir(parents=True, exist_ok=True)
        path = (self._downloads / ref.digest).resolve()

        def prefix(digest: str) -> str:
            return self._subjects.round_blob(run, digest)

        await get_blob(self._source, prefix, ref, FileSink(path))
        return path

    async def _fetch_of_app(self, ref: BlobRef, file: Path) -> None:
        await get_blob(self._source, self._subjects.blob, ref, FileSink(file))

    @property
    def _source(self) -> Source:
        region = self._config.region
        here, hub = self._broker.streams_of(region), self._broker.hub_of(region)
        return Source(self._broker, DOWN, domain=here, fallback_domain=hub)

    async def send(self) -> None:
        """Send finished answers for ever, each until the broker has it."""
        while True:
            task = await self._to_send.get()
            await self._until_sent(task)

    async def _until_sent(self, key: str) -> None:
        stored, message_id = self._outbox.stored(key), unguessable()
        try:
            await until_done(log, "outbox.waits", lambda: self._send_once(key, stored, message_id), task=key)
            self._outbox.sent(key)
        except FedtideError as exc:
            log.error("outbox.dropped", extra={"task": key, "reason": str(exc)})
            self._outbox.drop(key)

    async def _send_once(self, key: str, stored: set[str], message_id: str) -> None:
        pending = self._outbox.read(key)
        reply, region, node = pending.reply, self._config.region, self._config.node

        where, stream = (self._subjects.stay_blob, STAY) if reply.stays else (self._subjects.update_blob, UP)

        def prefix(digest: str) -> str:
            return where(region, node, reply.run, digest)

        for path in pending.blobs.values():
            await put_blob(self._broker, prefix, stream, [_mapped(path)], ttl_s=None, stored=stored)
        subject = self._subjects.reply(region, node, reply.run, reply.task)
        await self._broker.publish(subject, to_json(reply), message_id=message_id)


def _mapped(path: Path) -> memoryview:
    try:
        return map_file(path)
    except (OSError, ValueError) as exc:
        raise MalformedMessage(f"the outbox lost {path.name}: {exc}") from exc


def _error(task: Task, code: int, reason: str) -> WireMessage:
    """An error reply made without flwr."""
    return task.message.reply(time.time(), error=WireError(code=code, reason=reason))
