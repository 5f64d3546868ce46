"""The whole API over a real socket, on a broker in memory, in a thread of its own."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from aiohttp import web
from prometheus_client import CollectorRegistry

from fedtide.coordinator.adapters.attesting import Attesting
from fedtide.coordinator.adapters.audit import AuditTrail
from fedtide.coordinator.adapters.director import Director
from fedtide.coordinator.adapters.metering import Metering
from fedtide.coordinator.adapters.node_questions import NodeQuestions
from fedtide.coordinator.adapters.presence import Presence
from fedtide.coordinator.adapters.run_logs import RunLogs
from fedtide.coordinator.adapters.run_models import RunModels
from fedtide.coordinator.adapters.starting import Starter
from fedtide.coordinator.api import metrics
from fedtide.coordinator.api.audit import AuditApi
from fedtide.coordinator.api.costs import CostApi
from fedtide.coordinator.api.events import EventApi
from fedtide.coordinator.api.fleet import FleetApi
from fedtide.coordinator.api.http import application
from fedtide.coordinator.api.identity import IdentityApi
from fedtide.coordinator.api.models import ModelApi
from fedtide.coordinator.api.parked import ParkedApi
from fedtide.coordinator.api.people import PeopleApi
from fedtide.coordinator.api.principals import Principals
from fedtide.coordinator.api.rollouts import RolloutApi
from fedtide.coordinator.api.runs import RunApi
from fedtide.coordinator.api.storage import StorageApi
from fedtide.coordinator.api.tenants import TenantApi
from fedtide.coordinator.api.triggers import TriggerApi
from fedtide.coordinator.api.trust import TrustApi
from fedtide.coordinator.commands import AnnouncePresence, Command
from fedtide.coordinator.executor import Executor
from fedtide.coordinator.log.engine import Engine
from fedtide.coordinator.log.event_log import EventLog
from fedtide.coordinator.log.parked import ParkedReports
from fedtide.coordinator.log.reports import Reports
from fedtide.coordinator.log.snapshots import Snapshots
from fedtide.coordinator.page.screens import Apis, Page
from fedtide.coordinator.page.session import Session
from fedtide.coordinator.storage.housekeeping import Housekeeping
from fedtide.fabric.events.envelope import CoordinatorElected, EventData
from fedtide.fabric.nats.streams import hub_streams
from fedtide.fabric.nats.subjects import Subjects
from tests.shell.fake_broker import FakeNats

SUBJECTS = Subjects()


@dataclass(frozen=True)
class Served:
    """Where the API answers, and the routes that it has: method and path with `{names}`."""

    host: str
    port: int
    routes: list[tuple[str, str]]

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}"


@contextmanager
def served_api(*story: EventData) -> Iterator[Served]:
    """A coordinator's API after these events; commands are not carried out."""
    ready: list[Served] = []
    started, ending = threading.Event(), threading.Event()
    thread = threading.Thread(target=lambda: asyncio.run(_serve(story, ready, started, ending)), daemon=True)
    thread.start()
    assert started.wait(30)
    try:
        yield ready[0]
    finally:
        ending.set()
        thread.join(30)


async def _leads() -> None:
    """Nobody else does."""


async def _cannot(_: Command) -> None:
    raise ValueError("cannot be carried out")


async def _serve(
    story: tuple[EventData, ...], ready: list[Served], started: threading.Event, ending: threading.Event
) -> None:
    broker = FakeNats().connect()
    for config in hub_streams(SUBJECTS):
        await broker.ensure_stream(config)
    engine = Engine(broker, SUBJECTS, EventLog(broker, SUBJECTS), Snapshots(broker, SUBJECTS))
    await engine.take_over(CoordinatorElected(name="one"))
    running = asyncio.create_task(engine.run())
    for data in story:
        await engine.submit(data)
    async with asyncio.TaskGroup() as group:
        presence, starter = Presence(broker, SUBJECTS, engine, group), Starter(engine, RunModels(broker, SUBJECTS))
        executor = Executor(_cannot, group)
        reports = Reports(broker, SUBJECTS, engine, ParkedReports(broker, SUBJECTS), ["eu"])
        await reports.parked.park("up.eu.n1.rpt.joined", b"{}", "no event")
        housekeeping = Housekeeping(broker, SUBJECTS, engine, [], Path("nowhere"), _leads, {}, members_only=False)
        executor.start("evt-1", (AnnouncePresence("n1", "online"),))
        director, principals = Director(engine, None), Principals(None, lambda: engine.world.people, None)
        questions = NodeQuestions(broker, SUBJECTS, director)
        apis = Apis(
            models=ModelApi(broker, SUBJECTS, engine, housekeeping),
            fleet=FleetApi(engine, presence, questions),
            runs=RunApi(engine, presence, starter, RunLogs(broker, SUBJECTS), questions),
            rollouts=RolloutApi(broker, SUBJECTS, engine, starter),
            triggers=TriggerApi(engine),
            events=EventApi(engine, lambda: EventLog(broker, SUBJECTS), executor),
            identity=IdentityApi(engine, None, ["eu"], {}),
            storage=StorageApi(housekeeping),
            costs=CostApi(engine, Metering(engine, dict, tuple, Path("nowhere"))),
            trust=TrustApi(engine, director, Attesting(broker, SUBJECTS, engine, director, by_people=True)),
            people=PeopleApi(engine, principals),
            audit=AuditApi(AuditTrail(broker, SUBJECTS)),
        )
        registry = CollectorRegistry()
        registry.register(metrics.WorldMetrics(engine, executor, reports.parked, housekeeping, presence))
        metrics.Timings(engine, registry, traced=False)
        routes = [
            *apis.routes(),
            ParkedApi(reports, executor, engine).routes(),
            metrics.routes(registry),
            TenantApi(engine, None).routes(),
        ]
        app = application(routes)
        Page(apis, lambda: engine.world, Session(principals)).add_to(app)
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        host, port = runner.addresses[0][:2]
        ready.append(Served(host, port, [(r.method, r.path) for each in routes for r in each]))
        started.set()
        await asyncio.to_thread(ending.wait)
        await runner.cleanup()
    running.cancel()
    await broker.close()
