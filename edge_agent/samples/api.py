"""Samples over HTTP, on the node itself: labels in, counts out, deletion on request.

POST   /v2/models/{model}/labels     {"labels": {"<request id>": 3, ...}}
GET    /v2/samples
DELETE /v2/models/{model}/samples    ?id=... | ?before=<Unix seconds> | neither: all
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable

from aiohttp import web

from fedtide.edge_agent.samples.capture import Capturer
from fedtide.edge_agent.samples.store import SampleStore
from fedtide.edge_agent.serving.scoring import Labels
from fedtide.fabric.errors import RemoteError


class SampleApi:
    """Handlers over the node's sample store; `labelled` is called with the model whose samples got labels."""

    def __init__(self, store: SampleStore, capturer: Capturer, labelled: Callable[[str], None]) -> None:
        self._store = store
        self._capturer = capturer
        self._labelled = labelled

    def routes(self) -> list[web.RouteDef]:
        return [
            web.post("/v2/models/{model}/labels", self._label),
            web.get("/v2/samples", self._counts),
            web.delete("/v2/models/{model}/samples", self._forget),
        ]

    async def _label(self, request: web.Request) -> web.Response:
        model = request.match_info["model"]
        labels = _labels(await request.read())
        matched = await self._capturer.label(model, labels)
        if matched:
            self._labelled(model)
        return web.json_response({"received": len(labels), "matched": matched})

    async def _counts(self, _: web.Request) -> web.Response:
        await self._capturer.flush()
        return web.json_response(self._store.counts())

    async def _forget(self, request: web.Request) -> web.Response:
        before = request.query.get("before")
        try:
            limit = float(before) if before is not None else None
        except ValueError as exc:
            raise RemoteError(f"before is {before!r}, not a number of Unix seconds") from exc
        await self._capturer.flush()
        model, key = request.match_info["model"], request.query.get("id")
        gone = await asyncio.to_thread(self._store.forget, model, id_=key, before=limit)
        return web.json_response({"deleted": gone})


def _labels(body: bytes) -> dict[str, Labels]:
    try:
        told = json.loads(body)["labels"]
    except (ValueError, KeyError, TypeError) as exc:
        raise RemoteError("labels must be a JSON object", 'Write {"labels": {"<request id>": 3}}') from exc
    if not isinstance(told, dict) or not all(_is_label(v) for v in told.values()):
        raise RemoteError("labels must map request ids to a number, a class name, or a list of them")
    try:
        "".join(told).encode()
    except UnicodeEncodeError as exc:
        raise RemoteError("labels: a request id is no text") from exc
    return told


def _is_label(value: object) -> bool:
    if isinstance(value, list):
        return bool(value) and all(not isinstance(v, list) and _is_label(v) for v in value)
    return isinstance(value, str) or (isinstance(value, int | float) and abs(value) < 2**63)
