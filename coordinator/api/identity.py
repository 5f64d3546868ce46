"""The API of identities: join tokens, revocation, and what a region's servers need."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Literal

from aiohttp import web

from fedtide.coordinator.adapters.enrolment import Enroller
from fedtide.coordinator.api.http import Listing, answer, asker, name_in, page_of, query_of, read_body
from fedtide.coordinator.api.routes import Route, delete, get, post
from fedtide.coordinator.identity import identities
from fedtide.coordinator.log.engine import Engine
from fedtide.fabric.errors import CapabilityMissing
from fedtide.fabric.events.identity import NodeRemoved
from fedtide.fabric.messages.requests import RegionRequest, RevokeRequest, TokenRequest
from fedtide.fabric.messages.views import (
    JoinTokenView,
    NewJoinToken,
    Page,
    RegionCredentials,
    RegionView,
    Removed,
    Revoked,
    Rights,
    TokenState,
)


class TokenListing(Listing):
    state: TokenState | Literal[""] = ""
    region: str = ""


class IdentityApi:
    """Handlers; without an authority they say how to make one."""

    def __init__(
        self, engine: Engine, enroller: Enroller | None, regions: Sequence[str], unserved: Mapping[str, str]
    ) -> None:
        self._engine = engine
        self._unserved = unserved
        self._configured = regions
        self._maybe_enroller = enroller

    def routes(self) -> list[Route]:
        return [
            get("/v1/join-tokens", self._tokens, "Join tokens", Page[JoinTokenView], query=TokenListing),
            post(
                "/v1/join-tokens",
                self._create,
                "Make a join token",
                NewJoinToken,
                body=TokenRequest,
                status=201,
                needs="admin",
            ),
            delete(
                "/v1/join-tokens/{token}", self._revoke_token, "Withdraw a join token", JoinTokenView, needs="admin"
            ),
            post(
                "/v1/nodes/{node}/revoke",
                self._revoke,
                "Take a node's credentials away",
                Revoked,
                body=RevokeRequest,
                needs="admin",
            ),
            delete("/v1/nodes/{node}", self._remove, "Forget a node", Removed, needs="admin"),
            get("/v1/identity/rights", self._rights, "Every role's rights", Rights),
            get("/v1/regions", self._regions, "Regions", Page[RegionView], query=Listing),
            delete("/v1/regions/{region}", self._remove_region, "Forget a region", Removed, needs="admin"),
            post(
                "/v1/regions/{region}/credentials",
                self._region,
                "New credentials of a region's servers",
                RegionCredentials,
                body=RegionRequest,
                status=201,
                needs="admin",
            ),
        ]

    @property
    def _enroller(self) -> Enroller:
        if self._maybe_enroller is None:
            raise CapabilityMissing("this installation has no identities", "Set identity_dir of the coordinator")
        return self._maybe_enroller

    async def _tokens(self, request: web.Request) -> web.Response:
        query, now = query_of(request, TokenListing), datetime.now(UTC)
        shown = {name: token_view(t, now) for name, t in self._engine.world.identities.tokens.items()}
        matching = [
            name
            for name, token in shown.items()
            if query.state in ("", token.state) and query.region in ("", token.region)
        ]
        return answer(page_of(query, matching, lambda name: shown[name]))

    async def _create(self, request: web.Request) -> web.Response:
        asked = await read_body(request, TokenRequest)
        token = await self._enroller.create_token(
            asked.region, asked.uses, timedelta(seconds=asked.ttl_s), replaces=asked.replaces, by=asker(request)
        )
        return answer(NewJoinToken(token=token), status=201)

    async def _revoke_token(self, request: web.Request) -> web.Response:
        name = name_in(request, "token")
        await self._enroller.revoke_token(name)
        return answer(token_view(self._engine.world.identities.tokens[name], datetime.now(UTC)))

    async def _revoke(self, request: web.Request) -> web.Response:
        node = name_in(request, "node")
        await self._enroller.revoke(node, (await read_body(request, RevokeRequest)).reason)
        return answer(Revoked(revoked=node))

    async def _rights(self, _: web.Request) -> web.Response:
        return answer(await self._enroller.rights())

    async def _remove(self, request: web.Request) -> web.Response:
        node = name_in(request, "node")
        self._engine.world.node(node)
        await self._engine.submit(NodeRemoved(node=node))
        return answer(Removed(removed=node))

    async def _regions(self, request: web.Request) -> web.Response:
        return answer(self.regions(query_of(request, Listing)))

    def regions(self, query: Listing) -> Page[RegionView]:
        world = self._engine.world
        nodes = Counter(node.region for node in world.nodes.values())
        online = Counter(node.region for node in world.nodes.values() if node.online)
        names = sorted({*self._configured, *nodes, *world.identities.regions})

        def view(name: str) -> RegionView:
            return RegionView(
                region=name,
                configured=name in self._configured,
                nodes=nodes[name],
                online=online[name],
                waits=self._unserved.get(name, ""),
                credentials_expire=world.identities.region_ends.get(name),
            )

        return page_of(query, names, view)

    async def _remove_region(self, request: web.Request) -> web.Response:
        region = name_in(request, "region")
        await self._enroller.remove_region(region)
        return answer(Removed(removed=region))

    async def _region(self, request: web.Request) -> web.Response:
        asked = await read_body(request, RegionRequest)
        region = name_in(request, "region")
        files = await self._enroller.region_files(region, asked.hosts, rotates=asked.rotates)
        return answer(RegionCredentials(files=files, accounts=self._enroller.accounts(region)), status=201)


def token_view(token: identities.Token, now: datetime) -> JoinTokenView:
    created = token.created
    left = created.uses - token.used
    state: TokenState = (
        "revoked" if token.revoked else "expired" if created.expires_at <= now else "open" if left else "spent"
    )
    return JoinTokenView(
        token=created.token,
        region=created.region or "any",
        state=state,
        uses_left=left,
        expires=created.expires_at,
        replaces=created.replaces,
        by=created.by,
    )
