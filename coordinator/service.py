"""The coordinator process: constructs the adapters, waits until it leads, and serves until it is stopped."""

from __future__ import annotations

import asyncio
import logging

from coordinator import schedules
from coordinator.config import CoordinatorConfig
from coordinator.engine import Engine
from coordinator.event_api import EventApi
from coordinator.event_log import EventLog
from coordinator.executor import Executor
from coordinator.front_door import FrontDoor
from coordinator.http_api import Api
from coordinator.launcher import LocalLauncher
from coordinator.leadership import Leadership
from coordinator.presence import Presence
from coordinator.questions import Questions
from coordinator.rollout_api import RolloutApi
from coordinator.snapshots import Snapshots
from coordinator.starting import Starter
from coordinator.topology import Topology
from coordinator.trigger_api import TriggerApi
from fabric.broker import Broker
from fabric.events import CoordinatorElected
from fabric.subjects import Subjects

log = logging.getLogger(__name__)


async def serve(config: CoordinatorConfig) -> None:
    """Run until cancelled: as a standby while another leads, then as the leader.

    Raises:
        BrokerUnavailable: no hub within half a minute.
        StaleWriter: another coordinator took over.
        ConfigError: the API's port is taken.
    """
    subjects = Subjects(config.tenant)
    broker = await Broker.connect(config.nats_url, config.name)
    door = FrontDoor(config)
    leadership: Leadership | None = None
    try:
        url = await door.open()
        topology = Topology(broker, subjects)
        await topology.create_missing()
        leadership = Leadership(broker, subjects, config.name, url)
        door.stand_by(leadership)
        async with asyncio.TaskGroup() as group:
            executor = Executor(broker, subjects, group)
            snapshots = Snapshots(broker, subjects)
            engine = Engine(broker, subjects, EventLog(broker, subjects), snapshots, executor.start)
            await engine.load()
            await _lead(engine, leadership)
            group.create_task(leadership.keep(), name="lease")
            await _work(config, broker, subjects, topology, executor, engine, leadership, door, group)
    finally:
        await door.close()
        if leadership is not None and leadership.is_mine:
            await leadership.release()
        await broker.close()


async def _lead(engine: Engine, leadership: Leadership) -> None:
    """Follow the log until the lease is ours and everything that was logged is applied."""
    acquiring = asyncio.create_task(leadership.acquire(), name="acquire")
    try:
        await engine.follow(acquiring)
        await acquiring
    finally:
        acquiring.cancel()


async def _work(
    config: CoordinatorConfig,
    broker: Broker,
    subjects: Subjects,
    topology: Topology,
    executor: Executor,
    engine: Engine,
    leadership: Leadership,
    door: FrontDoor,
    group: asyncio.TaskGroup,
) -> None:
    folder = config.data_dir / "runs"
    launcher = LocalLauncher(folder, config.nats_url, config.tenant, config.regions, executor.aggregator_exited)
    starter = Starter(engine)
    executor.connect(engine, launcher, starter)
    presence = Presence(broker, subjects, engine, group)
    try:
        # The first append fences whoever led before; only then may this process act.
        await engine.take_over(CoordinatorElected(name=config.name, url=door.url))
        await topology.ensure_hub()
        group.create_task(engine.run(), name="engine")
        engine.lead()
        await presence.start()
        await Questions(broker, subjects, engine).listen()
        group.create_task(engine.listen(leadership.confirmed), name="reports")
        group.create_task(engine.save_snapshots(), name="snapshots")

        async def ensure_regions() -> None:
            for region in config.regions:
                group.create_task(topology.ensure_region(region), name=f"region-{region}")

        await ensure_regions()
        broker.when_reconnected(ensure_regions)
        group.create_task(schedules.keep(engine), name="schedules")
        api = Api(broker, subjects, engine, presence, starter)
        events = EventApi(engine, lambda: EventLog(broker, subjects))
        if config.warm_aggregator:
            launcher.prepare()
        rollout_api = RolloutApi(broker, subjects, engine, starter)
        await door.serve(api.application(rollout_api.routes(), TriggerApi(engine).routes(), events.routes()))
        await asyncio.Event().wait()
    finally:
        await launcher.close()
