"""The coordinator process: constructs the adapters, recovers, and serves until it is stopped."""

from __future__ import annotations

import asyncio
import json
import logging

from aiohttp import web

from coordinator import schedules
from coordinator.config import CoordinatorConfig
from coordinator.engine import Engine
from coordinator.event_api import EventApi
from coordinator.event_log import EventLog
from coordinator.executor import Executor
from coordinator.http_api import Api
from coordinator.launcher import LocalLauncher
from coordinator.presence import Presence
from coordinator.questions import Questions
from coordinator.starting import Starter
from coordinator.topology import Topology
from coordinator.trigger_api import TriggerApi
from fabric.broker import Broker
from fabric.errors import ConfigError
from fabric.subjects import Subjects

log = logging.getLogger(__name__)


async def serve(config: CoordinatorConfig) -> None:
    """Run until cancelled.

    Raises:
        BrokerUnavailable: no hub within half a minute.
        StaleWriter: another coordinator took over.
        ConfigError: the API's port is taken.
    """
    subjects = Subjects(config.tenant)
    broker = await Broker.connect(config.nats_url, "coordinator")
    topology = Topology(broker, subjects)
    await topology.ensure_hub()
    async with asyncio.TaskGroup() as group:
        executor = Executor(broker, subjects, group)
        engine = Engine(broker, subjects, EventLog(broker, subjects), executor.start)
        launcher = LocalLauncher(
            config.data_dir / "runs", config.nats_url, config.tenant, config.regions, executor.aggregator_exited
        )
        starter = Starter(engine)
        executor.connect(engine, launcher, starter)
        presence = Presence(broker, subjects, engine, group)
        await engine.recover()
        await presence.start()
        await Questions(broker, subjects, engine).listen()
        group.create_task(engine.run(), name="engine")
        group.create_task(engine.listen(), name="reports")
        for region in config.regions:
            group.create_task(topology.ensure_region(region), name=f"region-{region}")
        group.create_task(schedules.keep(engine), name="schedules")
        api = Api(broker, subjects, engine, presence, starter)
        events = EventApi(engine, lambda: EventLog(broker, subjects))
        runner = await _listen(config, api.application(TriggerApi(engine).routes(), events.routes()))
        try:
            await asyncio.Event().wait()
        finally:
            await runner.cleanup()
            await launcher.close()
            await broker.close()


async def _listen(config: CoordinatorConfig, app: web.Application) -> web.AppRunner:
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=1)
    await runner.setup()
    try:
        await web.TCPSite(runner, config.http_host, config.http_port).start()
    except OSError as exc:
        raise ConfigError(
            "http_port", f"port {config.http_port} cannot be used: {exc.strerror}", "Choose another, or 0"
        ) from exc
    host, port = runner.addresses[0][:2]
    log.info("api.listening", extra={"url": f"http://{host}:{port}"})
    if config.endpoint_file is not None:
        part = config.endpoint_file.with_suffix(".part")
        part.write_text(json.dumps({"url": f"http://{host}:{port}"}))
        part.replace(config.endpoint_file)
    return runner
