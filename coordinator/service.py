"""The coordinator process: waits until it leads, and serves the installation and its tenants until it is stopped."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from functools import partial

from aiohttp import web

from fedtide.coordinator.adapters.hosting import Hosted, Hosting
from fedtide.coordinator.adapters.topology import Topology
from fedtide.coordinator.api.front_door import FrontDoor
from fedtide.coordinator.config import CoordinatorConfig
from fedtide.coordinator.leading import Ground, Links, lead
from fedtide.coordinator.log.engine import Engine
from fedtide.coordinator.log.event_log import EventLog
from fedtide.coordinator.log.leader_lease import Leadership
from fedtide.coordinator.log.log_marks import ConfigMapMarks, FileMarks, LogGuard, Marks
from fedtide.coordinator.log.snapshots import Snapshots
from fedtide.fabric.nats.authority import COORDINATOR, SYSTEM_CREDENTIALS, Authority
from fedtide.fabric.nats.broker import Broker
from fedtide.fabric.nats.credentials import Access
from fedtide.fabric.nats.subjects import Subjects


async def serve(config: CoordinatorConfig) -> None:
    """Run until cancelled: as a standby while another leads, then as the leader.

    Raises:
        BrokerUnavailable: no hub within half a minute.
        CredentialsRefused: the hub does not let this coordinator in (any more).
        StaleWriter: another coordinator took over.
        ConfigError: the API's port is taken, or the content of `identity_dir` is wrong.
    """
    authority = Authority.load(config.identity_dir) if config.identity_dir is not None else None
    async with AsyncExitStack() as stack:
        broker = await _connect(config, COORDINATOR, stack)
        system = await _connect(config, SYSTEM_CREDENTIALS, stack) if authority is not None else None
        links = Links(broker, system, authority)
        door = FrontDoor(config)
        stack.push_async_callback(door.close)
        url = await door.open()
        subjects = Subjects(config.tenant)
        guard = LogGuard(broker, marks_of(config))
        await guard.check()
        engine = Engine(broker, subjects, EventLog(broker, subjects), Snapshots(broker, subjects))
        leadership = Leadership(broker, subjects, config.name, url)
        hosting = None
        topology = Topology(broker, subjects, config.regions, config.stream_replicas)
        if authority is not None and system is not None:
            serve_one = partial(_serve_tenant, host=config, links=links, door=door, leadership=leadership)
            hosting = Hosting(engine, config, authority, system, topology, serve_one)
            topology.set_aside = hosting.set_aside
        await topology.create_missing()
        stack.push_async_callback(_release, leadership)
        door.stand_by(leadership)
        async with asyncio.TaskGroup() as group:
            group.create_task(broker.until_closed(), name="connection")
            group.create_task(door.keep_certificate(), name="certificate")
            await engine.load()
            group.create_task(leadership.hold(), name="lease")
            await engine.follow(leadership.acquired)
            show = partial(door.serve, tenants=lambda: engine.world.tenants)
            ground = Ground(config, links, topology, engine, guard, leadership, url, show, hosting)
            await lead(ground, group)


async def _serve_tenant(
    tenant: Hosted, *, host: CoordinatorConfig, links: Links, door: FrontDoor, leadership: Leadership
) -> None:
    """Lead for one more tenant, until cancelled; this process leads already."""
    config, subjects = tenant.config, Subjects(tenant.config.tenant)
    async with AsyncExitStack() as stack:
        broker = await _connect(config, COORDINATOR, stack)
        edges = await _connect(config, SYSTEM_CREDENTIALS, stack)
        of_tenant = Links(broker, links.system, tenant.authority, tenant.on_hub, edges)
        topology = Topology(broker, subjects, config.regions, config.stream_replicas)
        limit = tenant.quota().bytes
        topology.quota = limit // config.stream_replicas if limit is not None else None
        guard = LogGuard(broker, marks_of(host, config))
        await guard.check()
        await topology.create_missing()
        engine = Engine(broker, subjects, EventLog(broker, subjects), Snapshots(broker, subjects))
        stack.callback(door.unmount, tenant.name)

        async def show(app: web.Application) -> None:
            door.mount(tenant.name, app)

        async with asyncio.TaskGroup() as group:
            group.create_task(broker.until_closed(), name=f"connection-{tenant.name}")
            await engine.load()
            await leadership.wait_until_fresh()
            group.create_task(tenant.look_after(engine), name=f"quota-{tenant.name}")
            ground = Ground(config, of_tenant, topology, engine, guard, leadership, door.advertised, show)
            await lead(ground, group)


async def _connect(config: CoordinatorConfig, file: str, stack: AsyncExitStack) -> Broker:
    credentials = config.identity_dir / file if config.identity_dir is not None else None
    broker = await Broker.connect(config.nats_url, config.name, Access(credentials, config.ca_file))
    stack.push_async_callback(broker.close)
    return broker


async def _release(leadership: Leadership) -> None:
    if leadership.is_mine:
        await leadership.release()


def marks_of(host: CoordinatorConfig, of_tenant: CoordinatorConfig | None = None) -> Marks:
    """Where this installation remembers its log outside of the broker, or that of one of its tenants."""
    if host.kubernetes is None:
        return FileMarks((of_tenant or host).data_dir)
    from kubernetes import client

    from fedtide.fabric.cluster.connection import api_client

    where, tenant = host.kubernetes, of_tenant.data_dir.name if of_tenant is not None else ""
    return ConfigMapMarks(client.CoreV1Api(api_client()), where.namespace, where.release, tenant)
