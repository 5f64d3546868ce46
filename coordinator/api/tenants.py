"""The API of tenants: who shares this installation, and how much of it each may use. Only its own admins see that."""

from __future__ import annotations

from aiohttp import web

from fedtide.coordinator.adapters.hosting import Hosting
from fedtide.coordinator.api.http import Listing, answer, asker, name_in, page_of, query_of, read_body
from fedtide.coordinator.api.routes import Route, delete, get, post, put
from fedtide.coordinator.log.engine import Engine
from fedtide.fabric.errors import CapabilityMissing
from fedtide.fabric.messages.tenants import (
    NewTenant,
    QuotaChange,
    TenantChange,
    TenantRequest,
    TenantUse,
    TenantView,
)
from fedtide.fabric.messages.views import Page


class TenantApi:
    """Handlers."""

    def __init__(self, engine: Engine, hosting: Hosting | None) -> None:
        """`hosting`: None in an installation without identities, whose broker tells nobody apart."""
        self._engine = engine
        self._there_is = hosting

    @property
    def _hosting(self) -> Hosting:
        if self._there_is is None:
            raise CapabilityMissing("tenants are told apart by their credentials, and this installation has none")
        return self._there_is

    def routes(self) -> list[Route]:
        return [
            get("/v1/tenants", self._all, "Tenants", Page[TenantView], query=Listing, needs="admin"),
            get("/v1/tenants/{tenant}", self._one, "One tenant", TenantView, needs="admin"),
            post("/v1/tenants", self._add, "Add a tenant", NewTenant, body=TenantRequest, status=201, needs="admin"),
            put(
                "/v1/tenants/{tenant}",
                self._change,
                "Other regions of a tenant, or keys of its director",
                TenantView,
                body=TenantChange,
                needs="admin",
            ),
            put(
                "/v1/tenants/{tenant}/quota",
                self._quota,
                "What a tenant may use",
                TenantView,
                body=QuotaChange,
                needs="admin",
            ),
            delete("/v1/tenants/{tenant}", self._remove, "Remove a tenant, with its data", TenantView, needs="admin"),
        ]

    async def _all(self, request: web.Request) -> web.Response:
        used = await self._hosting.used() if self._engine.world.tenants else {}
        return answer(
            page_of(query_of(request, Listing), sorted(self._engine.world.tenants), lambda name: self._view(name, used))
        )

    async def _one(self, request: web.Request) -> web.Response:
        return await self._shown(name_in(request, "tenant"))

    async def _add(self, request: web.Request) -> web.Response:
        asked = await read_body(request, TenantRequest)
        return answer(await self._hosting.add(asked, asker(request)), status=201)

    async def _change(self, request: web.Request) -> web.Response:
        name, asked = name_in(request, "tenant"), await read_body(request, TenantChange)
        await self._hosting.change(name, asked, asker(request))
        return await self._shown(name)

    async def _quota(self, request: web.Request) -> web.Response:
        name, asked = name_in(request, "tenant"), await read_body(request, QuotaChange)
        quota = asked.applied_to(self._hosting.tenant(name).quota)
        await self._hosting.set_quota(name, quota, asker(request))
        return await self._shown(name)

    async def _remove(self, request: web.Request) -> web.Response:
        name = name_in(request, "tenant")
        view = self._view(name, await self._hosting.used())
        await self._hosting.remove(name, asker(request))
        return answer(view)

    async def _shown(self, name: str) -> web.Response:
        self._hosting.tenant(name)
        return answer(self._view(name, await self._hosting.used()))

    def _view(self, name: str, used: dict[str, TenantUse]) -> TenantView:
        tenant = self._hosting.tenant(name)
        return TenantView(
            name=name,
            state=self._hosting.state_of(name),
            regions=list(tenant.regions),
            quota=tenant.quota,
            used=used.get(name, TenantUse()),
            currency=self._engine.world.prices.currency,
            added=tenant.at,
            by=tenant.added.by,
        )
