"""Serves the tenants of an installation beside its own: accounts on the hub, a folder of keys, room, quotas, prices.

What a tenant's coordinator needs is derived from the installation's secret, or is in its log, sealed with that
(`tenant_keys`): any process that leads can serve every tenant.
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
import secrets
import shutil
import tempfile
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from fedtide.coordinator.adapters.tenant_keys import TenantKeys, publish
from fedtide.coordinator.adapters.topology import Topology
from fedtide.coordinator.bookkeeping import QUOTA
from fedtide.coordinator.config import CoordinatorConfig
from fedtide.coordinator.identity import certificates
from fedtide.coordinator.identity.installation_secrets import API_TOKEN, CA_CERT, CA_KEY
from fedtide.coordinator.identity.tenants import Tenant, found
from fedtide.coordinator.log.engine import Engine
from fedtide.fabric import logs
from fedtide.fabric.errors import ConfigError, FedtideError, MalformedMessage, StaleWriter
from fedtide.fabric.events.costs import PricesApplied
from fedtide.fabric.events.tenants import QuotaSet, TenantAdded, TenantChanged, TenantForgotten, TenantRemoved
from fedtide.fabric.ids import unguessable
from fedtide.fabric.messages.tenants import Files, NewTenant, Quota, TenantChange, TenantRequest, TenantUse
from fedtide.fabric.nats import jwt as nats_jwt
from fedtide.fabric.nats.accounts import CORE
from fedtide.fabric.nats.authority import ALL_ISSUED, COORDINATOR, Authority
from fedtide.fabric.nats.broker import Broker
from fedtide.fabric.nats.credentials import Access, write_secret
from fedtide.fabric.nats.permissions import LIMITS_OF, STORES
from fedtide.fabric.process.retry import Backoff
from fedtide.fabric.trust import ceremony, keys
from fedtide.fabric.trust.installation import DIRECTOR_KEY, ROOTS, TARGETS, TIMESTAMP_KEY

log = logging.getLogger(__name__)

OWN_SHARE = 0.25
"""Of the hub's store, which no quota takes from the installation."""
SERVED, STARTING, LEAVING = "served", "starting", "is being removed"
NEEDED = (ROOTS, TARGETS, DIRECTOR_KEY, TIMESTAMP_KEY)
"""Of a director. Later keys have a number in their names."""


@dataclass(slots=True)
class Hosted:
    """One tenant that is served.

    Args:
        authority: as its own regions know it; `on_hub`: as the hub does.
        config: of its coordinator: this installation's, but for what is the tenant's.
        quota: as it is now.
        host: of the installation.
        engine: of the tenant; None before it is loaded.
    """

    name: str
    authority: Authority
    on_hub: Authority
    config: CoordinatorConfig
    quota: Callable[[], Quota]
    host: Engine
    engine: Engine | None = None
    is_served: bool = False

    async def look_after(self, engine: Engine) -> None:
        """Tell the tenant's log of its quota and of the installation's prices, now and when they change; for ever."""
        self.engine = engine
        with self.host.watch() as changed:
            while True:
                if engine.world.quota != (quota := self.quota()):
                    await engine.submit(QuotaSet(quota=quota))
                if engine.world.prices != (book := self.host.world.prices):
                    await engine.submit(PricesApplied(book=book, by="the installation"))
                self.is_served = True
                await changed()

    @property
    def used(self) -> TenantUse:
        if self.engine is None:
            return TenantUse()
        world = self.engine.world
        kept = world.budgets.get(QUOTA)
        return TenantUse(
            nodes=sum(not node.revoked for node in world.identities.nodes.values()),
            runs=sum(1 for _ in world.active_runs()),
            money=kept.spent if kept is not None else TenantUse().money,
        )


Serve = Callable[[Hosted], Awaitable[None]]


@dataclass(slots=True)
class _Running:
    """`problem`: why it is not served at the moment."""

    of: Tenant
    hosted: Hosted | None = None
    problem: str = ""
    task: asyncio.Task[None] | None = None

    @property
    def state(self) -> str:
        if self.problem:
            return self.problem
        return SERVED if self.hosted is not None and self.hosted.is_served else STARTING


class Hosting:
    """Of one installation, while this process leads.

    Args:
        system: a connection to the hub's own account.
        topology: of the installation's own streams, which make room for those of tenants.
        serve: leads for one tenant until it is cancelled.
    """

    def __init__(
        self,
        engine: Engine,
        config: CoordinatorConfig,
        authority: Authority,
        system: Broker,
        topology: Topology,
        serve: Serve,
    ) -> None:
        self._engine = engine
        self._config = config
        self._keys = TenantKeys(config, authority)
        self._system = system
        self._topology = topology
        self._serve = serve
        self._running: dict[str, _Running] = {}
        self._room_for: dict[str, int] = {}
        self._leaving: set[str] = set()
        """Of those that are being removed: their nonces."""

    @property
    def _tenants(self) -> Mapping[str, Tenant]:
        return self._engine.world.tenants

    async def add(self, asked: TenantRequest, by: str) -> NewTenant:
        """Add a tenant.

        Raises:
            ConfigError: files are missing, or the name is taken by the installation itself.
            InvalidTransition: there is one of that name already, or there are too many.
        """
        if asked.name == self._config.tenant:
            raise ConfigError("name", f"{asked.name!r} is the installation itself", "Choose another name")
        if lacks := sorted(set(NEEDED) - set(asked.files)):
            raise ConfigError("files", f"lack {', '.join(lacks)}", "fedtide tenant add makes them")
        await self._check_room(asked.name, asked.quota)
        ca_cert, ca_key = certificates.authority(f"fedtide {asked.name}")
        token = secrets.token_urlsafe(32)
        files = {**_checked(asked.files), CA_CERT: ca_cert, CA_KEY: ca_key, API_TOKEN: token}
        added = TenantAdded(
            tenant=asked.name,
            nonce=unguessable(),
            regions=asked.regions,
            quota=asked.quota,
            sealed=self._keys.sealed(files),
            namespace=asked.namespace,
            releases_signed_by=asked.releases_signed_by,
            by=by,
        )
        await self._engine.submit(added)
        signer = self._keys.authority_of(self._tenants[asked.name]).of_release_authority().text
        return NewTenant(name=asked.name, token=token, signer=signer, hub_url=self._config.nats_url)

    async def change(self, name: str, asked: TenantChange, by: str) -> None:
        """Other regions, or further keys of its director.

        Raises:
            NotFound: there is no such tenant.
            ConfigError: files that are none of a director.
        """
        known, sealed = self.tenant(name), None
        if asked.files is not None:
            has = self._keys.files_of(known)
            for file, text in _checked(asked.files).items():
                if file.endswith(".pem") and has.get(file, text) != text:
                    raise ConfigError(f"files.{file}", "is there already, and another one", "Name it director-2.pem")
            sealed = self._keys.sealed({**has, **asked.files})
        await self._engine.submit(TenantChanged(tenant=name, regions=asked.regions, sealed=sealed, by=by))

    async def set_quota(self, name: str, quota: Quota, by: str) -> None:
        """Raises NotFound; ConfigError: the hub has no room for it."""
        if quota.bytes != self.tenant(name).quota.bytes:
            await self._check_room(name, quota)
        await self._engine.submit(TenantChanged(tenant=name, quota=quota, by=by))

    async def remove(self, name: str, by: str) -> None:
        """Let nobody of a tenant in any more, and delete what the hub has stored for it. Raises NotFound."""
        self.tenant(name)
        await self._engine.submit(TenantRemoved(tenant=name, by=by))

    def tenant(self, name: str) -> Tenant:
        """Raises NotFound."""
        return found(self._tenants, name)

    def state_of(self, name: str) -> str:
        running = self._running.get(name)
        if self.tenant(name).is_leaving:
            return LEAVING
        return running.state if running is not None else STARTING

    async def used(self) -> dict[str, TenantUse]:
        """How much of its quota each tenant uses that is served."""
        try:
            stored = await self._stores()
        except FedtideError as exc:
            log.warning("tenant.use_unknown", extra={"reason": str(exc)})
            stored = {}
        served = {name: each.hosted for name, each in self._running.items() if each.hosted is not None}
        return {
            name: hosted.used.model_copy(update={"bytes": stored.get(hosted.authority.public(CORE), 0)})
            for name, hosted in served.items()
        }

    async def keep(self) -> None:
        """Serve every tenant, for ever.

        Raises:
            StaleWriter: another coordinator has taken over.
        """
        async with asyncio.TaskGroup() as group:
            with self._engine.watch() as changed:
                while True:
                    await self._arrange(group)
                    await changed()

    async def _arrange(self, group: asyncio.TaskGroup) -> None:
        wanted = dict(self._tenants)
        for name, running in list(self._running.items()):
            if _is_another(running.of, wanted.get(name)):
                if running.task is not None:
                    running.task.cancel()
                    await asyncio.wait({running.task})
                del self._running[name]
        await self._make_room(wanted)
        for name, tenant in wanted.items():
            if tenant.is_leaving and tenant.added.nonce not in self._leaving:
                self._leaving.add(tenant.added.nonce)
                group.create_task(self._forget_patiently(tenant), name=f"tenant-{name}-leaves")
            elif not tenant.is_leaving and name not in self._running:
                running = self._running[name] = _Running(tenant)
                running.task = group.create_task(self._serve_patiently(running), name=f"tenant-{name}")

    async def _make_room(self, wanted: Mapping[str, Tenant]) -> None:
        """Before a tenant's account is made: a server makes none for whose quota it has no room left."""
        room_for = {name: tenant.quota.bytes or 0 for name, tenant in wanted.items()}
        if room_for != self._room_for:
            self._room_for = room_for
            await self._topology.fit_hub_again()

    async def set_aside(self, own: int) -> int:
        """Bytes of the hub's store that tenants may still reserve, and that are not to be taken for the installation.

        Args:
            own: what the installation's own streams have reserved.
        """
        promised = self._promised()
        if not promised:
            return 0
        reserved = int(json.loads(await self._system.ask(STORES, b"{}"))["data"].get("reserved_storage", 0))
        return max(0, promised - max(0, reserved - own))

    def _promised(self, but: str = "") -> int:
        """Bytes of one server of the hub that are tenants': each server holds every stream."""
        others = (tenant.quota.bytes or 0 for name, tenant in self._tenants.items() if name != but)
        return sum(others) // self._config.stream_replicas

    async def _check_room(self, name: str, quota: Quota) -> None:
        """Raises ConfigError: the hub has not so much beside what is promised to others, and what it needs itself."""
        if quota.bytes is None:
            raise ConfigError("quota.bytes", "must be a number: the hub promises them", "For example 1000000000")
        answer = json.loads(await self._system.ask(STORES, b'{"config": true}'))
        has = int(answer["data"]["config"]["max_storage"])
        free = int(has * (1 - OWN_SHARE)) - self._promised(but=name)
        if quota.bytes // self._config.stream_replicas > free:
            most = max(0, free) * self._config.stream_replicas
            raise ConfigError(
                "quota.bytes",
                f"{quota.bytes} are more than the hub has left: {most}. It has {has} a server, and {OWN_SHARE:.0%} of "
                "that are the installation's own",
                "Enlarge the hub's store, or lower the quotas of others",
            )

    async def _stores(self) -> dict[str, int]:
        """Bytes that the hub stores, by account that may store something."""
        answer = json.loads(await self._system.ask(STORES, b'{"accounts": true}'))
        return {each["id"]: int(each["storage"]) for each in answer["data"].get("account_details") or ()}

    async def _serve_patiently(self, running: _Running) -> None:
        """What goes wrong for one tenant is tried again, and holds up no other."""
        logs.TENANT.set(running.of.name)
        backoff = Backoff(cap_s=60.0)
        while True:
            try:
                hosted = running.hosted = self._hosted(running.of)
                # Not less than before: streams are made smaller before what they may have in all.
                most = max(running.of.quota.bytes or 0, await self._limit_of(hosted))
                await publish(self._system, hosted.on_hub.with_room(most), running.of.regions)
                running.problem = ""
                await self._serve(hosted)
            except* StaleWriter:
                raise
            except* Exception as failures:  # whatever it is: others are served all the same
                running.problem = _first_of(failures)
                log.exception("tenant.not_served")
            await backoff.wait()

    async def _limit_of(self, hosted: Hosted) -> int:
        """What a tenant's streams may have in all, as far as the hub knows; 0: it knows no such tenant."""
        raw = await self._system.ask(LIMITS_OF.format(hosted.authority.public(CORE)))
        try:
            return int(nats_jwt.read(raw.decode())["nats"]["limits"]["disk_storage"])
        except (MalformedMessage, KeyError, ValueError):
            return 0

    async def _forget_patiently(self, tenant: Tenant) -> None:
        """What goes wrong is tried again, and holds up no other."""
        logs.TENANT.set(tenant.name)
        backoff = Backoff(cap_s=60.0)
        while True:
            try:
                return await self._forget(tenant)
            except StaleWriter:
                raise
            except Exception:  # whatever it is: others are served all the same
                log.exception("tenant.removal_waits")
            await backoff.wait()

    async def _forget(self, tenant: Tenant) -> None:
        authority, on_hub = self._keys.authority_of(tenant), self._keys.on_hub(tenant)
        before = datetime.now(UTC) - timedelta(seconds=1)
        await publish(self._system, on_hub, tenant.regions, lambda _: {ALL_ISSUED: (before, before)})
        if authority.public(CORE) in await self._stores():
            with tempfile.TemporaryDirectory() as folder:
                shown = Path(folder) / COORDINATOR
                write_secret(shown, authority.of_coordinators()[COORDINATOR])
                await self._delete_streams(Access(shown, self._config.ca_file))
        now = datetime.now(UTC)
        await publish(self._system, on_hub, tenant.regions, lambda _: {ALL_ISSUED: (now, now)})
        await asyncio.to_thread(shutil.rmtree, self._keys.folder_of(tenant), ignore_errors=True)
        await self._engine.submit(TenantForgotten(tenant=tenant.name, nonce=tenant.added.nonce))

    async def _delete_streams(self, access: Access) -> None:
        broker = await Broker.connect(self._config.nats_url, self._config.name, access)
        try:
            for stream in await broker.stream_names():
                await broker.delete_stream(stream)
        finally:
            await broker.close()

    def _hosted(self, tenant: Tenant) -> Hosted:
        return Hosted(
            name=tenant.name,
            authority=self._keys.authority_of(tenant),
            on_hub=self._keys.on_hub(tenant),
            config=self._keys.written(tenant),
            quota=lambda: self.tenant(tenant.name).quota,
            host=self._engine,
        )


def _is_another(was: Tenant, now: Tenant | None) -> bool:
    """Whether it has to be served anew, or not at all."""
    if now is None or now.is_leaving or now.added.nonce != was.added.nonce:
        return True
    return (was.regions, was.sealed, was.quota.bytes) != (now.regions, now.sealed, now.quota.bytes)


def _checked(files: Files) -> Files:
    for name, text in files.items():
        if name in (ROOTS, TARGETS):
            _check_metadata(name, text)
        elif re.fullmatch(r"(director|timestamp)(-[1-9][0-9]?)?\.pem", name) is not None:
            keys.parsed(text.encode(), f"files.{name}")
        else:
            raise ConfigError("files", f"{name!r} is none of a director", f"Known: {', '.join(NEEDED)}, director-2.pem")
    return dict(files)


def _check_metadata(name: str, text: str) -> None:
    try:
        if name == TARGETS:
            ceremony.read_targets(text)
        else:
            for root in json.loads(text):
                ceremony.read_root(root)
    except (ValueError, TypeError, KeyError) as exc:
        raise ConfigError(f"files.{name}", f"holds no metadata of that kind: {exc}", "fedtide trust init") from exc


def _first_of(failures: BaseExceptionGroup[Exception]) -> str:
    first: BaseException = failures
    while isinstance(first, BaseExceptionGroup):
        first = first.exceptions[0]
    return str(first) or type(first).__name__
