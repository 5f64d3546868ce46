"""The API of identities: join tokens, revocation, and what a region's servers need."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Annotated

from aiohttp import web
from pydantic import Field

from fedtide.coordinator.adapters.enrolment import Enroller
from fedtide.coordinator.api.http_api import read_body
from fedtide.coordinator.identity import identities
from fedtide.coordinator.log.engine import Engine
from fedtide.fabric.errors import CapabilityMissing
from fedtide.fabric.messages.tasks import Strict

LONGEST_TTL_S = 30 * 86_400


class TokenRequest(Strict):
    """`region` empty: any."""

    region: str = ""
    uses: int = Field(default=1, ge=1, le=100_000)
    ttl_s: float = Field(default=3600.0, gt=0, le=LONGEST_TTL_S)
    replaces: bool = False
    by: str = "cli"


class RevokeRequest(Strict):
    reason: str = ""


class RegionRequest(Strict):
    """Names under which nodes reach the region's leaf."""

    hosts: list[Annotated[str, Field(pattern=r"^(\*\.)?[A-Za-z0-9]([A-Za-z0-9.:-]{0,252})$")]] = []


class IdentityApi:
    """Handlers; without an authority they say how to make one."""

    def __init__(self, engine: Engine, enroller: Enroller | None) -> None:
        self._engine = engine
        self._maybe_enroller = enroller

    def routes(self) -> list[web.RouteDef]:
        return [
            web.get("/v1/join-tokens", self._tokens),
            web.post("/v1/join-tokens", self._create),
            web.delete("/v1/join-tokens/{token}", self._revoke_token),
            web.post("/v1/nodes/{node}/revoke", self._revoke),
            web.post("/v1/regions/{region}/credentials", self._region),
        ]

    @property
    def _enroller(self) -> Enroller:
        if self._maybe_enroller is None:
            raise CapabilityMissing("this installation has no identities", "Set identity_dir of the coordinator")
        return self._maybe_enroller

    async def _tokens(self, _: web.Request) -> web.Response:
        now = datetime.now(UTC)
        return web.json_response([_view(t, now) for t in self._engine.world.identities.tokens.values()])

    async def _create(self, request: web.Request) -> web.Response:
        asked = await read_body(request, TokenRequest)
        token = await self._enroller.create_token(
            asked.region, asked.uses, timedelta(seconds=asked.ttl_s), replaces=asked.replaces, by=asked.by
        )
        return web.json_response({"token": token}, status=201)

    async def _revoke_token(self, request: web.Request) -> web.Response:
        name = request.match_info["token"]
        await self._enroller.revoke_token(name)
        return web.json_response({"revoked": name})

    async def _revoke(self, request: web.Request) -> web.Response:
        node = request.match_info["node"]
        await self._enroller.revoke(node, (await read_body(request, RevokeRequest)).reason)
        return web.json_response({"revoked": node})

    async def _region(self, request: web.Request) -> web.Response:
        asked = await read_body(request, RegionRequest)
        files = await self._enroller.region_files(request.match_info["region"], asked.hosts)
        return web.json_response({"files": files, "accounts": self._enroller.accounts}, status=201)


def _view(token: identities.Token, now: datetime) -> dict[str, object]:
    created = token.created
    left = created.uses - token.used
    state = "revoked" if token.revoked else "expired" if created.expires_at <= now else "open" if left else "spent"
    return {
        "token": created.token,
        "region": created.region or "any",
        "state": state,
        "uses_left": left,
        "expires": created.expires_at.isoformat(timespec="seconds"),
        "replaces": created.replaces,
        "by": created.by,
    }
