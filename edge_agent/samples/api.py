"""The API of a node's samples: add labels, read counts, delete. Over HTTP on the node, and over the broker.

POST   /v2/models/{model}/labels     {"labels": {"<request id>": 3, ...}}
GET    /v2/samples
DELETE /v2/models/{model}/samples    ?id=... | ?before=<RFC 3339, or Unix seconds> | neither: all
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from aiohttp import web
from pydantic import BaseModel, TypeAdapter, ValidationError

from fedtide.edge_agent.samples.capture import Capturer
from fedtide.edge_agent.samples.store import SampleStore
from fedtide.fabric.encoding import from_json
from fedtide.fabric.errors import ConfigError, RemoteError
from fedtide.fabric.messages.requests import ForgetRequest, LabelsRequest, SamplesQuestion
from fedtide.fabric.messages.views import LabelsMatched, SampleCounts, SamplesForgotten, SamplesView
from fedtide.fabric.nats.broker import Answerer, Broker
from fedtide.fabric.nats.jetstream import Received
from fedtide.fabric.nats.node_answers import answered
from fedtide.fabric.nats.subjects import ALL_MODELS, Question, Subjects, parse_as
from fedtide.fabric.validation import first_problem

_FORGET: TypeAdapter[ForgetRequest] = TypeAdapter(ForgetRequest)


class SampleApi:
    """Over the node's sample store; `labelled` is called with the model whose samples got labels."""

    def __init__(self, node: str, store: SampleStore, capturer: Capturer, labelled: Callable[[str], None]) -> None:
        self._node = node
        self._store = store
        self._capturer = capturer
        self._labelled = labelled

    def routes(self) -> list[web.RouteDef]:
        return [
            web.post("/v2/models/{model}/labels", self._on_labels),
            web.get("/v2/samples", self._on_counts),
            web.delete("/v2/models/{model}/samples", self._on_forget),
        ]

    async def listen(
        self, broker: Broker, subjects: Subjects, region: str, guarded: Callable[[Answerer], Answerer]
    ) -> None:
        """Answer the coordinator's questions."""
        await broker.answer(subjects.samples(region, self._node, "*"), guarded(self._on_question))

    async def counts(self) -> SamplesView:
        await self._capturer.flush()
        counted = await asyncio.to_thread(self._store.counts)
        return SamplesView(node=self._node, models={m: SampleCounts.model_validate(c) for m, c in counted.items()})

    async def label(self, model: str, asked: LabelsRequest) -> LabelsMatched:
        matched = await self._capturer.label(model, asked.labels)
        if matched:
            self._labelled(model)
        return LabelsMatched(received=len(asked.labels), matched=matched)

    async def forget(self, model: str, asked: ForgetRequest) -> SamplesForgotten:
        await self._capturer.flush()
        before = asked.before.timestamp() if asked.before is not None else None
        gone = await asyncio.to_thread(self._store.forget, model, id_=asked.id, before=before)
        return SamplesForgotten(deleted=gone)

    async def _on_question(self, message: Received) -> tuple[bytes, dict[str, str]]:
        return await answered(self._answer(message))

    async def _answer(self, message: Received) -> BaseModel:
        model = parse_as(Question, message.subject).about
        asked = from_json(SamplesQuestion, message.data, "question")
        if model == ALL_MODELS:
            return await self.counts()
        if asked.label is not None:
            return await self.label(model, asked.label)
        if asked.forget is not None:
            return await self.forget(model, asked.forget)
        raise ConfigError("question", "says neither what to label nor what to forget")

    async def _on_labels(self, request: web.Request) -> web.Response:
        try:
            asked = LabelsRequest.model_validate_json(await request.read())
        except ValidationError as exc:
            raise RemoteError(first_problem(exc), 'Write {"labels": {"<request id>": 3}}') from exc
        return _json(await self.label(request.match_info["model"], asked))

    async def _on_counts(self, _: web.Request) -> web.Response:
        return web.json_response((await self.counts()).model_dump()["models"])

    async def _on_forget(self, request: web.Request) -> web.Response:
        query: dict[str, Any] = dict(request.query)
        try:
            asked = _FORGET.validate_python(query)
        except ValidationError as exc:
            raise RemoteError(first_problem(exc), "Write ?id=... or ?before=2026-01-31T00:00:00Z") from exc
        return _json(await self.forget(request.match_info["model"], asked))


def _json(view: BaseModel) -> web.Response:
    return web.Response(body=view.model_dump_json().encode(), content_type="application/json")
