"""The API of who asks: who am I, where people log in, tokens of programs."""

from __future__ import annotations

import secrets
from datetime import UTC, datetime, timedelta

from aiohttp import web

from fedtide.coordinator.api.http import Listing, answer, asker, name_in, page_of, principal, query_of, read_body
from fedtide.coordinator.api.principals import NOBODY_ASKS, SERVICE, Principals, digest_of
from fedtide.coordinator.api.routes import Route, delete, get, post
from fedtide.coordinator.identity import people
from fedtide.coordinator.log.engine import Engine
from fedtide.fabric.errors import NotFound
from fedtide.fabric.events.people import ServiceTokenCreated, ServiceTokenRevoked
from fedtide.fabric.messages.people import (
    LoginView,
    NewServiceToken,
    PrincipalView,
    ServiceTokenRequest,
    ServiceTokenView,
)
from fedtide.fabric.messages.views import Page


class PeopleApi:
    """Handlers."""

    def __init__(self, engine: Engine, principals: Principals) -> None:
        self._engine = engine
        self._principals = principals

    def routes(self) -> list[Route]:
        return [
            get("/v1/whoami", self._whoami, "Who you are here", PrincipalView),
            get("/v1/login", self._login, "Where people log in", LoginView, is_open=True),
            get("/v1/tokens", self._all, "Service tokens", Page[ServiceTokenView], query=Listing, needs="admin"),
            post(
                "/v1/tokens",
                self._create,
                "Make a service token",
                NewServiceToken,
                body=ServiceTokenRequest,
                status=201,
                needs="admin",
            ),
            delete("/v1/tokens/{token}", self._revoke, "Withdraw a service token", ServiceTokenView, needs="admin"),
        ]

    async def _whoami(self, request: web.Request) -> web.Response:
        return answer(principal(request) or NOBODY_ASKS)

    async def _login(self, _: web.Request) -> web.Response:
        if self._principals.oidc is None:
            raise NotFound("nobody logs in here: there is no identity provider", "Use the installation's token")
        return answer(self._principals.oidc.view)

    async def _all(self, request: web.Request) -> web.Response:
        known, now = self._engine.world.people.tokens, datetime.now(UTC)
        return answer(page_of(query_of(request, Listing), sorted(known), lambda key: people.view(known[key], now)))

    async def _create(self, request: web.Request) -> web.Response:
        asked = await read_body(request, ServiceTokenRequest)
        key = secrets.token_hex(5)
        token = f"{SERVICE}_{key}_{secrets.token_urlsafe(32)}"
        created = ServiceTokenCreated(
            id=key,
            name=asked.name,
            digest=digest_of(token),
            role=asked.role,
            expires_at=datetime.now(UTC) + timedelta(seconds=asked.ttl_s),
            by=asker(request),
        )
        await self._engine.submit(created)
        return answer(NewServiceToken(id=key, token=token), status=201)

    async def _revoke(self, request: web.Request) -> web.Response:
        key = name_in(request, "token")
        if key not in self._engine.world.people.tokens:
            raise NotFound(f"there is no service token {key!r}", "See `fedtide token ls`")
        await self._engine.submit(ServiceTokenRevoked(id=key))
        return answer(people.view(self._engine.world.people.tokens[key], datetime.now(UTC)))
