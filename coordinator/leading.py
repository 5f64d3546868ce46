"""What a leader does for one tenant: constructs the adapters, and serves until it is stopped."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from aiohttp import web
from prometheus_client import CollectorRegistry

from fedtide.coordinator.adapters import schedules
from fedtide.coordinator.adapters.attesting import Attesting
from fedtide.coordinator.adapters.audit import AuditTrail
from fedtide.coordinator.adapters.director import Director
from fedtide.coordinator.adapters.distribution import Distribution
from fedtide.coordinator.adapters.enrolment import Enroller, Told
from fedtide.coordinator.adapters.gate_queries import GateQueries
from fedtide.coordinator.adapters.hosting import Hosting
from fedtide.coordinator.adapters.metering import Metering
from fedtide.coordinator.adapters.node_questions import NodeQuestions
from fedtide.coordinator.adapters.notices import Notices
from fedtide.coordinator.adapters.oidc import OidcLogin
from fedtide.coordinator.adapters.order_lists import OrderLists
from fedtide.coordinator.adapters.presence import Presence
from fedtide.coordinator.adapters.run_logs import RunLogs
from fedtide.coordinator.adapters.run_models import RunModels
from fedtide.coordinator.adapters.run_services import RunServices, RunStreams
from fedtide.coordinator.adapters.server_usage import ServerUsage
from fedtide.coordinator.adapters.starting import Starter
from fedtide.coordinator.adapters.topology import Topology
from fedtide.coordinator.adapters.traces import Traces
from fedtide.coordinator.adapters.tracking import RunTracking
from fedtide.coordinator.api import metrics
from fedtide.coordinator.api.access import access_middleware
from fedtide.coordinator.api.audit import AuditApi, audit_middleware
from fedtide.coordinator.api.costs import CostApi
from fedtide.coordinator.api.events import EventApi
from fedtide.coordinator.api.fleet import FleetApi
from fedtide.coordinator.api.http import application
from fedtide.coordinator.api.identity import IdentityApi
from fedtide.coordinator.api.models import ModelApi
from fedtide.coordinator.api.parked import ParkedApi
from fedtide.coordinator.api.people import PeopleApi
from fedtide.coordinator.api.principals import Principals
from fedtide.coordinator.api.process_metrics import ProcessMetrics
from fedtide.coordinator.api.rollouts import RolloutApi
from fedtide.coordinator.api.runs import RunApi
from fedtide.coordinator.api.storage import StorageApi
from fedtide.coordinator.api.tenants import TenantApi
from fedtide.coordinator.api.triggers import TriggerApi
from fedtide.coordinator.api.trust import TrustApi
from fedtide.coordinator.command_handlers import AggregatorReports, CommandHandlers
from fedtide.coordinator.config import CoordinatorConfig
from fedtide.coordinator.executor import Executor
from fedtide.coordinator.identity import installation_secrets
from fedtide.coordinator.launch.launcher import CredentialsOf, Launcher
from fedtide.coordinator.launch.local import RUN_FOLDERS, LocalLauncher
from fedtide.coordinator.log.engine import Engine
from fedtide.coordinator.log.event_log import EventLog
from fedtide.coordinator.log.leader_lease import Leadership
from fedtide.coordinator.log.log_marks import LogGuard
from fedtide.coordinator.log.parked import ParkedReports
from fedtide.coordinator.log.reports import Reports
from fedtide.coordinator.log.timers import Alarms
from fedtide.coordinator.page.screens import Apis
from fedtide.coordinator.page.screens import Page as WebPage
from fedtide.coordinator.page.session import Session
from fedtide.coordinator.runs import runs
from fedtide.coordinator.storage.housekeeping import Housekeeping
from fedtide.fabric.events.envelope import CoordinatorElected
from fedtide.fabric.nats.authority import COORDINATOR, Authority
from fedtide.fabric.nats.broker import Broker
from fedtide.fabric.nats.credentials import Credentials
from fedtide.fabric.nats.subjects import Subjects
from fedtide.fabric.plans.run_spec import RunSpec
from fedtide.fabric.process.retry import until_done
from fedtide.fabric.process.web_access import TokenFile

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Links:
    """Connections to the hub, and who signs for whom; `system` and `authority`: if identities are used.

    Args:
        system: to the hub's own account.
        authority: of the tenant, as its regions know it.
        on_hub: the same, as the hub knows it.
        edges: to the account of the tenant's own servers; None: that is the hub's.
    """

    broker: Broker
    system: Broker | None = None
    authority: Authority | None = None
    on_hub: Authority | None = None
    edges: Broker | None = None


@dataclass(frozen=True, slots=True)
class Ground:
    """What a leader stands on, for one tenant.

    Args:
        lease: that of the process: it leads for all tenants, or for none.
        show: serves an application.
        hosting: other tenants that are served beside this one; None: there cannot be any.
    """

    config: CoordinatorConfig
    links: Links
    topology: Topology
    engine: Engine
    guard: LogGuard
    lease: Leadership
    url: str
    show: Callable[[web.Application], Awaitable[None]]
    hosting: Hosting | None = None


async def lead(ground: Ground, group: asyncio.TaskGroup) -> None:
    """Act as the leader, until cancelled.

    Raises:
        StaleWriter: another coordinator took over.
        CredentialsRefused: the hub does not let this coordinator in (any more).
    """
    config, links, topology, engine, guard = ground.config, ground.links, ground.topology, ground.engine, ground.guard
    broker, subjects, leadership = links.broker, Subjects(config.tenant), ground.lease
    director, enroller = Director(engine, config.identity_dir), None
    if links.authority is not None and links.system is not None:
        told = Told(links.system, links.on_hub or links.authority, links.edges)
        enroller = Enroller(broker, told, engine, links.authority, config, director)
    members_only = enroller is not None
    launcher = _launcher(config, enroller, AggregatorReports(broker, subjects, engine), engine)
    starter, presence = (
        Starter(engine, RunModels(broker, subjects), config.tracking, config.prometheus.keys(), director),
        Presence(broker, subjects, engine, group, members_only=members_only),
    )
    alarms = Alarms(engine, group)
    streams = RunStreams(broker, subjects, config.regions)
    trail = AuditTrail(broker, subjects)
    by_people = config.releases_signed_by == "people"
    attesting = Attesting(broker, subjects, engine, director, by_people=by_people)
    handlers = CommandHandlers(
        broker,
        subjects,
        engine,
        launcher,
        starter,
        presence,
        alarms,
        enroller,
        streams,
        Notices(config.notify),
        director,
        attesting,
        trail,
    )
    traces = Traces(engine, config.traces, config.name)
    executor = Executor(traces.around(handlers.handle), group)
    housekeeping = Housekeeping(
        broker,
        subjects,
        engine,
        config.regions,
        config.data_dir,
        leadership.wait_until_fresh,
        topology.unserved,
        members_only=members_only,
    )
    reports = Reports(
        broker,
        subjects,
        engine,
        ParkedReports(broker, subjects),
        config.regions,
        members_only=members_only,
        room=housekeeping.until_log_has_room,
    )
    is_tenants = links.edges is not None
    ledger_file = config.data_dir / "metering.json"
    metering = Metering(engine, housekeeping.stored_bytes, launcher.helpers, ledger_file, is_tenants=is_tenants)
    try:
        # The first append fences off the previous leader; only then may this process act.
        await engine.take_over(CoordinatorElected(name=config.name, url=ground.url))
        await topology.ensure_hub()
        group.create_task(engine.run(), name="engine")
        await until_done(log, "parked.waits", reports.parked.load)
        await director.begin()  # before anything is ordered
        engine.lead(executor.start)
        group.create_task(director.keep(), name="director")
        await guard.settle(engine)
        topology.epoch = engine.world.epoch.id
        group.create_task(guard.keep(engine), name="log-mark")
        await presence.start()
        await RunServices(broker, subjects, engine, streams, director).listen()
        await OrderLists(broker, subjects, config.regions, engine, director).listen()
        if enroller is not None:
            await enroller.listen()
            group.create_task(enroller.keep_accounts(), name="accounts")
        group.create_task(reports.listen(leadership.wait_until_fresh), name="reports")
        group.create_task(engine.save_snapshots(), name="snapshots")

        look_again = {region: asyncio.Event() for region in config.regions}
        for region, event in look_again.items():
            group.create_task(topology.keep_region(region, event), name=f"region-{region}")

        async def look_at_all() -> None:
            for event in look_again.values():
                event.set()

        broker.when_reconnected(look_at_all)
        group.create_task(schedules.keep(engine), name="schedules")
        group.create_task(housekeeping.run(), name="housekeeping")
        tracking = RunTracking(engine, Distribution(broker, subjects), config.tracking, config.data_dir)
        more_warnings = lambda: [  # noqa: E731
            *tracking.warnings(),
            *traces.warnings(),
            *director.warnings(),
            *_ending_credentials(config),
        ]
        group.create_task(tracking.keep(), name="tracking")
        group.create_task(traces.keep(), name="traces")
        group.create_task(GateQueries(engine, config.prometheus).keep(), name="gate-queries")
        metering.begin()
        presence.hearers.append(metering.heard)
        presence.worker_hearers.append(metering.heard_worker)
        if links.system is not None and not is_tenants:
            await ServerUsage(metering.heard_server).listen(links.system)
        group.create_task(metering.keep(), name="metering")
        storage = StorageApi(housekeeping)
        launcher.prepare()
        token = TokenFile(config.http_token_file) if config.http_token_file is not None else None
        oidc = OidcLogin(config.oidc) if config.oidc is not None else None
        principals = Principals(token, lambda: engine.world.people, oidc)
        questions = NodeQuestions(broker, subjects, director)
        apis = Apis(
            models=ModelApi(broker, subjects, engine, housekeeping, more_warnings),
            fleet=FleetApi(engine, presence, questions),
            runs=RunApi(engine, presence, starter, RunLogs(broker, subjects), questions),
            rollouts=RolloutApi(broker, subjects, engine, starter),
            triggers=TriggerApi(engine, config.notify.keys()),
            events=EventApi(engine, lambda: EventLog(broker, subjects), executor),
            identity=IdentityApi(engine, enroller, config.regions, topology.unserved),
            storage=storage,
            costs=CostApi(engine, metering, is_tenants=is_tenants),
            trust=TrustApi(engine, director, attesting),
            people=PeopleApi(engine, principals),
            audit=AuditApi(trail),
        )
        registry = CollectorRegistry()
        registry.register(metrics.WorldMetrics(engine, executor, reports.parked, housekeeping, presence))
        timings = metrics.Timings(engine, registry, traced=bool(config.traces.endpoint))
        group.create_task(timings.keep(), name="timings")
        processes = ProcessMetrics(engine, registry)
        presence.worker_hearers.append(processes.heard_worker)
        group.create_task(processes.keep(), name="process-metrics")
        routes = [
            *apis.routes(),
            ParkedApi(reports, executor, engine).routes(),
            metrics.routes(registry),
        ]
        if not is_tenants:
            routes.append(TenantApi(engine, ground.hosting).routes())
        if ground.hosting is not None:
            group.create_task(ground.hosting.keep(), name="tenants")
        checks = [*access_middleware(principals, config.http_host), storage.refuse_new_things]
        app = application(routes, checks, audit_middleware(trail))
        WebPage(apis, lambda: engine.world, Session(principals)).add_to(app)
        await ground.show(app)
        await asyncio.Event().wait()
    finally:
        metering.save()
        await launcher.close()


def _ending_credentials(config: CoordinatorConfig) -> list[str]:
    if config.identity_dir is None:
        return []
    return installation_secrets.warnings(Credentials.load(config.identity_dir / COORDINATOR))


def _launcher(
    config: CoordinatorConfig, enroller: Enroller | None, reports: AggregatorReports, engine: Engine
) -> Launcher:
    credentials: CredentialsOf = enroller.aggregator_credentials if enroller is not None else lambda _, __: None
    if config.kubernetes is not None:
        from fedtide.coordinator.launch.kubernetes import KubernetesLauncher
        from fedtide.fabric.cluster.connection import api_client

        def model_bytes(spec: RunSpec) -> int | None:
            model = engine.world.models.get(spec.model or "")
            return model.latest.manifest.arrays.size_bytes if model is not None and model.latest is not None else None

        def wanted(run: str, attempt: int) -> bool:
            state = engine.world.runs.get(run)
            return state is not None and runs.is_current(state, attempt)

        return KubernetesLauncher(
            api_client(), config, config.kubernetes, credentials, reports, model_bytes=model_bytes, wanted=wanted
        )
    return LocalLauncher(config.data_dir / RUN_FOLDERS, config, credentials, reports.exited)
