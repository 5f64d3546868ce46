"""The agent of one node: assembles its parts and keeps them connected to the broker."""

from __future__ import annotations

import asyncio
import logging
import os
import random
import time
from contextlib import suppress

from pydantic import TypeAdapter

from fedtide.edge_agent.comparison.comparisons import Comparisons
from fedtide.edge_agent.config import AgentConfig
from fedtide.edge_agent.drift.recorder import DriftWatch
from fedtide.edge_agent.fleet_clock import FleetClock
from fedtide.edge_agent.identity.capabilities import collect
from fedtide.edge_agent.identity.cluster_node import ASK_EVERY_S, ClusterView
from fedtide.edge_agent.identity.enrolment import Enrolment, EnrolmentRefused, Renewals
from fedtide.edge_agent.identity.epochs import Epochs
from fedtide.edge_agent.identity.node_trust import NodeTrust, trust_store
from fedtide.edge_agent.releases.activation import Activation, serve_from_disk
from fedtide.edge_agent.releases.model_store import ModelStore
from fedtide.edge_agent.samples.api import SampleApi
from fedtide.edge_agent.samples.capture import Capturer
from fedtide.edge_agent.samples.store import SampleStore, samples_file
from fedtide.edge_agent.sandbox.levels import level_of
from fedtide.edge_agent.serving.footprint import shrink
from fedtide.edge_agent.serving.inference_server import InferenceServer
from fedtide.edge_agent.serving.nats_inference import NatsInference
from fedtide.edge_agent.serving.node_metrics import NodeMetrics, NodeState
from fedtide.edge_agent.serving.serving import Serving
from fedtide.edge_agent.tasks.app_logs import AppLogs
from fedtide.edge_agent.tasks.app_places import AppPlaces
from fedtide.edge_agent.tasks.governor import Latency
from fedtide.edge_agent.tasks.node_meter import NodeMeter
from fedtide.edge_agent.tasks.task_loop import TaskLoop
from fedtide.fabric.encoding import from_json, one_of_from_json, to_json
from fedtide.fabric.errors import BrokerUnavailable, ConfigError, CredentialsRefused, MalformedMessage, TransientError
from fedtide.fabric.events.envelope import Event, EventData, NodeJoined
from fedtide.fabric.events.identity import OrderRefused
from fedtide.fabric.events.rollouts import NodeMeasured, NodePhaseReported
from fedtide.fabric.ids import new_id, unguessable
from fedtide.fabric.messages.heartbeat import Heartbeat
from fedtide.fabric.messages.orders import OrderList
from fedtide.fabric.messages.tasks import Order
from fedtide.fabric.nats.broker import Broker
from fedtide.fabric.nats.credentials import Access
from fedtide.fabric.nats.jetstream import Received
from fedtide.fabric.nats.subjects import OrderFor, Subjects, parse_as
from fedtide.fabric.plans.rollout_plan import Desired, Measured, NodePhase
from fedtide.fabric.process.metering import resident_bytes
from fedtide.fabric.process.retry import until_done
from fedtide.fabric.trace_context import TRACEPARENT, TraceContext, within
from fedtide.fabric.trust.refusals import Untrusted

log = logging.getLogger(__name__)

SHOWS_AT_MOST_EVERY_S = 0.2
"""A node of small tasks changes what it shows a hundred times a second: each would cost as much as a task's answer."""
NOT_LET_IN_S = 15.0
_ORDER: TypeAdapter[Order] = TypeAdapter(Order)


class Agent:
    """One node. `run` works until it is cancelled, and then leaves nothing half written."""

    def __init__(self, config: AgentConfig) -> None:
        self._config = config
        self._subjects = Subjects(config.tenant)
        self._serving = Serving(config)
        self._server = InferenceServer(config, self._serving)
        self._latency = Latency()
        self._boot = new_id("boot")
        self._linked: Broker | None = None
        self._meter, self._began = NodeMeter(self._traffic), time.monotonic()
        self._reported = 0
        self._joined = 0
        self._clock = FleetClock()
        self._epochs = Epochs(config.data_dir)
        self._other_log: asyncio.Queue[OrderList] = asyncio.Queue()
        self._cluster = ClusterView()
        self._level = level_of(config.sandbox, config.apps_user)

    async def run(self) -> None:
        """Serve models from disk at once; join the fleet once the broker is reachable.

        Raises:
            ConfigError: the inference port is taken.
        """
        config = self._config
        config.data_dir.mkdir(parents=True, exist_ok=True)
        if self._level == "user":
            config.data_dir.chmod(0o700)  # what follows is for apps, and for nobody else of this machine
            os.umask(0o022)
            await asyncio.to_thread(AppPlaces(config, self._level).let_read)
        self._store_of_trust = trust_store(config)
        samples = SampleStore(samples_file(config.data_dir), config.capture.max_bytes, config.capture.max_age_s)
        capturer = Capturer(config.capture, samples, self._clock)
        self._comparisons = Comparisons(self._serving, samples, self._report_measured)
        self._serving.observers += [self._latency.observe, self._comparisons.observe]
        if config.capture.share:
            self._serving.observers.append(capturer.observe)
        self._samples = SampleApi(config.node, samples, capturer, self._comparisons.labels_came)
        metrics = NodeMetrics(self._serving, self._state)
        self._serving.observers.append(metrics.observe)
        await self._server.start(self._samples.routes(), metrics.routes())
        log.info("inference.listening", extra={"url": self._server.url})
        store = ModelStore(config.data_dir / "models")
        serve_from_disk(config, store, self._serving)
        self._look_ready(store)
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(capturer.run(), name="capture")
                group.create_task(self._keep_connected(store), name="connected")
        finally:
            await self._server.stop()
            self._serving.stop()
            await capturer.flush()
            samples.close()

    def _traffic(self) -> tuple[int, int]:
        return self._linked.traffic if self._linked is not None else (0, 0)

    def _state(self) -> NodeState:
        """For `/metrics`; before the node has been connected, too."""
        broker = self._linked
        used, _ = self._meter.totals()
        received, sent = self._traffic()
        used = used.model_copy(update={"received_bytes": received, "sent_bytes": sent})  # with those of tasks
        return NodeState(
            ready=self._server.ready,
            connected=broker is not None and broker.is_connected,
            training=broker is not None and self._tasks.busy is not None,
            used=used,
        )

    def _look_ready(self, store: ModelStore) -> None:
        """Ready: every model that this node should serve is served, by one of its releases."""
        served = self._serving.serving()
        self._server.ready = all(c.release is None or c.model in served for c in store.current())

    async def _keep_connected(self, store: ModelStore) -> None:
        """Run all that needs the broker, for ever. A node that is refused keeps serving, and retries."""
        refused = False
        while True:
            try:
                access = await Enrolment(self._config, self._store_of_trust).access(refused=refused)
                await self._connected(store, access)
            except (CredentialsRefused, EnrolmentRefused, BrokerUnavailable, ConfigError) as exc:
                # By turns with those that are stored: a token may be spent, and they may be good.
                refused = isinstance(exc, CredentialsRefused) or (isinstance(exc, EnrolmentRefused) and not refused)
                log.error("agent.not_let_in", extra={"reason": str(exc)})
            await asyncio.sleep(NOT_LET_IN_S)

    async def _connected(self, store: ModelStore, access: Access) -> None:
        config = self._config
        self._broker = broker = await Broker.connect(config.nats_url, f"agent-{config.node}", access, wait_s=None)
        self._linked = broker
        self._trust = trust = NodeTrust(config, self._store_of_trust, broker, self._report_refused)
        self._tasks = TaskLoop(
            config, broker, self._latency, self._clock, self._cluster, self._meter, self._level, trust
        )
        self._activation = Activation(
            config,
            store,
            broker,
            self._serving,
            self._report_phase,
            self._comparisons.begin,
            self._comparisons.end,
            self._clock,
            trust,
        )
        self._activation.swapped = lambda: self._look_ready(store)
        drift = DriftWatch(config, broker)
        ending: list[Exception] = []
        self._serving.observers.append(drift.observe)
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._activation.run(), name="activation")
                group.create_task(self._comparisons.run(), name="comparisons")
                group.create_task(drift.run(), name="drift")
                group.create_task(self._tasks.run(), name="tasks")
                group.create_task(self._tasks.send(), name="outbox")
                group.create_task(self._take_part(), name="presence")
                group.create_task(self._follow_cluster(), name="cluster")
                group.create_task(self._reconcile(), name="reconcile")
                group.create_task(self._rejoin(access), name="rejoin")
                group.create_task(Renewals(config, broker, access).run(), name="renewals")
                group.create_task(self._until_closed(broker), name="connection")
        except* (CredentialsRefused, EnrolmentRefused, BrokerUnavailable, ConfigError) as failures:
            ending.append(failures.exceptions[0])
        finally:
            self._serving.observers.remove(drift.observe)
            with suppress(TransientError):
                await broker.tell(self._subjects.telemetry(config.region, config.node), to_json(self._beat(bye=True)))
            await broker.close()
        if ending:
            raise ending[0]

    async def _until_closed(self, broker: Broker) -> None:
        await broker.until_closed()
        raise BrokerUnavailable("the connection to the broker was closed")

    async def _take_part(self) -> None:
        region, node = self._config.region, self._config.node
        await self._broker.subscribe(self._subjects.live_node(region, node), self._on_live)
        guarded = self._trust.guarded
        await NatsInference(self._broker, self._serving).listen(self._subjects, region, node, guarded)
        await self._samples.listen(self._broker, self._subjects, region, guarded)
        await AppLogs(self._config).listen(self._broker, self._subjects, guarded)
        self._broker.when_reconnected(self._catch_up)
        shrink()
        if self._cluster.is_there:
            await self._cluster.look()
        await self._join()
        await self._catch_up()
        while True:
            self._tasks.changed.clear()
            await self._heartbeat()
            with suppress(TimeoutError):
                async with asyncio.timeout(self._config.heartbeat_s):
                    await asyncio.sleep(SHOWS_AT_MOST_EVERY_S)
                    await self._tasks.changed.wait()

    async def _follow_cluster(self) -> None:
        """Report when the node is cordoned, drained or relabelled. Polls, since a watch would hold a connection to
        the API server for every node of a fleet."""
        while self._cluster.is_there:
            await asyncio.sleep(ASK_EVERY_S)
            if await self._cluster.look():
                await self._join()

    async def _join(self) -> None:
        joined = NodeJoined(
            node=self._config.node,
            region=self._config.region,
            capabilities=await asyncio.to_thread(collect, self._config, self._server.url, self._cluster.now),
        )
        self._joined += 1
        await self._publish(joined, f"{self._config.node}.joined.{self._boot}.{self._joined}")

    async def _reconcile(self) -> None:
        """Ask from time to time: what is pushed may be lost, and so may what the coordinator knew of this node."""
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(self._config.reconcile_s * random.uniform(0.5, 1.5)):  # noqa: S311  # not all at once
                    await self._trust.until_doubtful()
            await self._catch_up()

    async def _rejoin(self, access: Access) -> None:
        """Whenever the coordinator has another log than before: it may not know of this node, or of its key."""
        while True:
            told = await self._other_log.get()
            if self._epochs.is_another(told.epoch):
                log.warning("agent.rejoins", extra={"reason": "the coordinator's log is another one than before"})
                if access.credentials is not None and not told.member:
                    await Renewals(self._config, self._broker, access).renew()
                await self._join()
                self._epochs.keep(told.epoch)

    async def _catch_up(self) -> None:
        """Read the messages missed while disconnected. Which there are the coordinator knows; its answer is a hint."""

        async def ask() -> OrderList:
            began = time.monotonic()
            answer, is_believed = await self._trust.orders()
            if not is_believed:
                return answer  # what it names is checked by itself
            if answer.now is not None:
                self._clock.told(answer.now, time.monotonic() - began)
            if self._epochs.is_another(answer.epoch):
                self._other_log.put_nowait(answer)
            return answer

        for subject in (await until_done(log, "agent.waits_for_orders", ask)).subjects:
            try:
                await self._read_order(subject)
            except (MalformedMessage, Untrusted) as exc:
                log.warning("agent.order_refused", extra={"reason": str(exc)})

    async def _on_live(self, message: Received) -> None:
        """Take the message as a hint only, since its sender is not verified."""
        await self._read_order(message.subject)

    async def _read_order(self, subject: str) -> None:
        """Read an order from the region's stream, and follow it if it is for this node."""
        address = parse_as(OrderFor, subject)
        if (address.region, address.node) != (self._config.region, self._config.node):
            raise MalformedMessage(f"{subject!r} is no order for this node")
        stored = await self._broker.last(address.stream, subject, domain=self._broker.streams_of(self._config.region))
        if stored is None:
            return  # it comes live, once the region has it
        with within(TraceContext.parse(stored.headers.get(TRACEPARENT))):
            if address.kind == "desired":
                await self._trust.desired(stored)
                await self._activation.want(from_json(Desired, stored.data, subject))
                return
            order = one_of_from_json(_ORDER, stored.data, subject)
            if (order.run, order.task) != (address.run, address.name):
                raise MalformedMessage(f"{subject!r} holds an order of another run or task")
            await self._trust.order(stored, order)
            await self._tasks.order(order)

    def _beat(self, *, bye: bool = False) -> Heartbeat:
        used, wasted = self._meter.totals()
        return Heartbeat(
            rss_bytes=resident_bytes(os.getpid()),
            trainer_rss_bytes=self._tasks.trainer_bytes,
            busy=self._tasks.busy,
            stage=self._tasks.stage,
            serving=self._serving.serving(),
            inferences=self._serving.served,
            used=used,
            wasted=wasted,
            heartbeat_s=self._config.heartbeat_s,
            clock=time.time(),
            boot=self._boot,
            uptime_s=time.monotonic() - self._began,
            bye=bye,
        )

    async def _heartbeat(self) -> None:
        beat = self._beat()
        subject = self._subjects.telemetry(self._config.region, self._config.node)
        try:
            await self._broker.tell(subject, to_json(beat))
        except TransientError as exc:
            log.info("agent.heartbeat_lost", extra={"reason": str(exc)})

    async def _report_phase(self, desired: Desired, phase: NodePhase, reason: str, wan_bytes: int) -> None:
        log.info("release.%s", phase, extra={"rollout": desired.rollout, "reason": reason})
        data = NodePhaseReported(
            rollout=desired.rollout,
            node=self._config.node,
            counter=desired.counter,
            phase=phase,
            reason=reason,
            wan_bytes=wan_bytes,
        )
        await self._publish(data, f"{self._config.node}.{desired.rollout}.{desired.counter}.{phase}.{self._boot}")

    async def _report_measured(self, desired: Desired, measured: Measured) -> None:
        self._reported += 1
        data = NodeMeasured(rollout=desired.rollout, node=self._config.node, counter=desired.counter, measured=measured)
        await self._publish(data, f"{self._config.node}.measured.{self._boot}.{self._reported}")

    async def _report_refused(self, data: OrderRefused) -> None:
        self._reported += 1
        await self._publish(data, f"{self._config.node}.refused.{self._boot}.{self._reported}")

    async def _publish(self, data: EventData, key: str) -> None:
        """Report durably: the region's stream has it before this returns."""
        event = Event.now(f"agent/{self._config.node}", data, id=key)
        subject = self._subjects.report(self._config.region, self._config.node, data.kind.replace(".", "-"))
        encoded, message_id = to_json(event), unguessable()
        await until_done(
            log,
            "agent.report_waits",
            lambda: self._broker.publish(subject, encoded, message_id=message_id),
            kind=data.kind,
        )
