"""The API of the event log: what happened, and what is happening."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from dataclasses import asdict

from aiohttp import web

from fedtide.coordinator.log import history as causes
from fedtide.coordinator.log.engine import Engine
from fedtide.coordinator.log.event_log import EventLog
from fedtide.coordinator.runs.views import finite
from fedtide.fabric.errors import ConfigError
from fedtide.fabric.events.envelope import Event
from fedtide.fabric.events.runs import RunRequested

MAX_LIMIT = 10_000
_NAMES = ("run", "rollout", "node", "model", "name", "rule", "id")


class EventApi:
    """Reads the log; changes nothing."""

    def __init__(self, engine: Engine, log: Callable[[], EventLog]) -> None:
        self._engine = engine
        self._log = log

    def routes(self) -> list[web.RouteDef]:
        return [
            web.get("/v1/events", self._query),
            web.get("/v1/events/watch", self._watch),
            web.get("/v1/why/{name}", self._why),
        ]

    async def _query(self, request: web.Request) -> web.Response:
        limit = _limit(request, "50")
        wanted = _filter(request)
        newest: list[Event] = []
        async for event in self._log().newest_first():
            if wanted(event):
                newest.append(event)
                if len(newest) == limit:
                    break
        return web.json_response([finite(e.model_dump(mode="json")) for e in reversed(newest)])

    async def _why(self, request: web.Request) -> web.Response:
        name, asked = request.match_info["name"], request.query.get("round")
        if asked is not None and not asked.isdigit():
            raise ConfigError("round", f"{asked!r} is not a number", "For example: run-1234/3")
        number = int(asked) if asked is not None else None
        now = causes.present(self._engine.world, name, number)
        newest: list[causes.Because] = []
        limit = _limit(request, "40")
        async for event in self._log().newest_first():
            newest += causes.history([event], name, number)
            if len(newest) >= limit or (isinstance(event.data, RunRequested) and event.data.run == name):
                break
        return web.json_response({"present": now, "because": [asdict(b) for b in reversed(newest)]})

    async def _watch(self, request: web.Request) -> web.StreamResponse:
        wanted = _filter(request)
        response = web.StreamResponse(headers={"Content-Type": "application/x-ndjson"})
        await response.prepare(request)
        events: asyncio.Queue[Event] = asyncio.Queue(maxsize=MAX_LIMIT)
        with self._engine.listening(events):
            while True:
                event = await events.get()
                if wanted(event):
                    await response.write(json.dumps(finite(event.model_dump(mode="json"))).encode() + b"\n")


def _limit(request: web.Request, default: str) -> int:
    limit = request.query.get("limit", default)
    if not limit.isdigit() or not 1 <= int(limit) <= MAX_LIMIT:
        raise ConfigError("limit", f"must be 1 to {MAX_LIMIT}")
    return int(limit)


def _filter(request: web.Request) -> Callable[[Event], bool]:
    kind, about = request.query.get("kind", ""), request.query.get("about", "")

    def wanted(event: Event) -> bool:
        of_kind = event.data.kind.startswith(kind[:-1]) if kind.endswith("*") else kind in ("", event.data.kind)
        return of_kind and (not about or about in (getattr(event.data, n, None) for n in _NAMES))

    return wanted
