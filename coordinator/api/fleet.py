"""The API of the fleet: nodes, and requests to one node over the broker.

A node is only reached by its subject on the broker, never by an address that it reported: so a caller's credentials
never reach a machine that somebody else has named.
"""

from __future__ import annotations

import time
from typing import Literal, TypeVar

from aiohttp import web
from pydantic import Field

from fedtide.coordinator.adapters.node_questions import NodeQuestions
from fedtide.coordinator.adapters.presence import Presence
from fedtide.coordinator.api.http import Listing, answer, name_in, page_of, query_of, read_body
from fedtide.coordinator.api.routes import BYTES, Route, get, post
from fedtide.coordinator.fleet import fleet, views
from fedtide.coordinator.log.engine import Engine
from fedtide.fabric.errors import ConfigError
from fedtide.fabric.messages.requests import ForgetRequest, LabelsRequest, SamplesQuestion
from fedtide.fabric.messages.views import LabelsMatched, NodeState, NodeView, Page, SamplesForgotten, SamplesView
from fedtide.fabric.nats.subjects import ALL_MODELS
from fedtide.fabric.strict import Strict

V = TypeVar("V", bound=Strict)
TWINS_SHOWN_S = 3600.0
_HEADER_LENGTH = "Inference-Header-Content-Length"


class NodeListing(Listing):
    state: NodeState | Literal[""] = ""
    region: str = ""
    labels: str = Field(default="", description="a=b,c=d")


class AskOptions(Strict):
    timeout_s: float = Field(default=30.0, gt=0, le=300, allow_inf_nan=False)
    version: str = Field(default="", max_length=100)


class FleetApi:
    """Handlers over the engine's nodes."""

    def __init__(self, engine: Engine, presence: Presence, questions: NodeQuestions) -> None:
        self._engine = engine
        self._presence = presence
        self._questions = questions

    def routes(self) -> list[Route]:
        return [
            get("/v1/nodes", self._all, "Nodes", Page[NodeView], query=NodeListing),
            get("/v1/nodes/{node}", self._one, "One node", NodeView),
            post(
                "/v1/nodes/{node}/models/{model}/infer",
                self._infer,
                "An inference request to a node (Open Inference Protocol v2)",
                query=AskOptions,
                takes="application/json",
                media=BYTES,
            ),
            get("/v1/nodes/{node}/samples", self._samples, "What a node has captured", SamplesView, query=AskOptions),
            post(
                "/v1/nodes/{node}/samples/{model}/labels",
                self._label,
                "Labels for samples",
                LabelsMatched,
                query=AskOptions,
                body=LabelsRequest,
            ),
            post(
                "/v1/nodes/{node}/samples/{model}/forget",
                self._forget,
                "Forget samples",
                SamplesForgotten,
                query=AskOptions,
                body=ForgetRequest,
            ),
        ]

    def view(self, name: str) -> NodeView:
        presence = self._presence
        return views.node(
            self._engine.world.node(name),
            presence.heartbeats.get(name),
            presence.clock_ahead_s.get(name),
            twins=time.time() - presence.twins.get(name, 0.0) < TWINS_SHOWN_S,
        )

    def warned(self) -> dict[str, list[str]]:
        """What heartbeats say of nodes that needs a look, by node."""
        presence = self._presence
        names = {*presence.twins, *(n for n, ahead in presence.clock_ahead_s.items() if abs(ahead) > views.SKEW_S)}
        known = [name for name in names if name in self._engine.world.nodes]
        return {name: list(self.view(name).warnings) for name in known}

    async def _all(self, request: web.Request) -> web.Response:
        return answer(self.page(query_of(request, NodeListing)))

    def page(self, query: NodeListing) -> Page[NodeView]:
        selector = _labels(query.labels)
        matching = sorted(
            name
            for name, node in self._engine.world.nodes.items()
            if query.region in ("", node.region)
            and query.state in ("", "online" if node.online else "offline")
            and fleet.matches(node, selector)
        )
        return page_of(query, matching, self.view)

    async def _one(self, request: web.Request) -> web.Response:
        return answer(self.view(name_in(request, "node")))

    async def _infer(self, request: web.Request) -> web.Response:
        asked, node = query_of(request, AskOptions), self._engine.world.node(name_in(request, "node"))
        length = request.headers.get(_HEADER_LENGTH, "")
        if length and not (length.isascii() and length.isdecimal() and len(length) < 12):
            raise ConfigError(_HEADER_LENGTH, "is not a number")
        got = await self._questions.infer(
            node, name_in(request, "model"), await request.read(), length, asked.version, asked.timeout_s
        )
        headers = {_HEADER_LENGTH: got.header_length} if got.header_length else None
        kind = "application/octet-stream" if got.header_length else "application/json"
        return web.Response(body=got.body, status=got.status, content_type=kind, headers=headers)

    async def _samples(self, request: web.Request) -> web.Response:
        return answer(await self._ask(request, ALL_MODELS, SamplesQuestion(), SamplesView))

    async def _label(self, request: web.Request) -> web.Response:
        labels = await read_body(request, LabelsRequest)
        return answer(await self._ask(request, name_in(request, "model"), SamplesQuestion(label=labels), LabelsMatched))

    async def _forget(self, request: web.Request) -> web.Response:
        forget = await read_body(request, ForgetRequest)
        asked = SamplesQuestion(forget=forget)
        return answer(await self._ask(request, name_in(request, "model"), asked, SamplesForgotten))

    async def _ask(self, request: web.Request, model: str, asked: SamplesQuestion, kind: type[V]) -> V:
        node = self._engine.world.node(name_in(request, "node"))
        return await self._questions.samples(node, model, asked, kind, query_of(request, AskOptions).timeout_s)


def _labels(text: str) -> dict[str, str]:
    pairs = [part.partition("=") for part in text.split(",") if part]
    for key, equals, _ in pairs:
        if not key or not equals:
            raise ConfigError("labels", f"{text!r} is not a=b,c=d")
    return {key: value for key, _, value in pairs}
