"""The API of what hub and regions store: how full they are, and what nobody needs."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from aiohttp import web
from pydantic import Field

from fedtide.coordinator.api.http import answer, local_path, problem, query_of
from fedtide.coordinator.api.routes import Route, get, post
from fedtide.coordinator.storage.housekeeping import ALARMING, UNUSED_FOR, Housekeeping
from fedtide.fabric.messages.views import GarbageView, GarbageViews, StorageView, StreamView
from fedtide.fabric.strict import Strict

NEW_THINGS = (("PUT", "/v1/bundles"), ("POST", "/v1/events"), ("POST", "/v1/runs"), ("POST", "/v1/rollouts"))
"""What is refused when the log is nearly full; to cancel, to revoke and to roll back is not."""


class Sweep(Strict):
    dry_run: bool = Field(default=False, description="Only say what would go")
    unused_for_s: float = Field(default=UNUSED_FOR.total_seconds(), ge=0, le=1e9, description="See `fedtide gc --help`")


class StorageApi:
    """Handlers over the housekeeping of the leader."""

    def __init__(self, housekeeping: Housekeeping) -> None:
        self._housekeeping = housekeeping

    def routes(self) -> list[Route]:
        return [
            get("/v1/storage", self._show, "How full hub and regions are", StorageView),
            post("/v1/storage/sweep", self._sweep, "Delete what nobody needs", GarbageViews, query=Sweep),
        ]

    async def _show(self, _: web.Request) -> web.Response:
        return answer(await self.storage())

    async def storage(self) -> StorageView:
        await self._housekeeping.look()
        streams = [
            StreamView(
                region=place.region,
                stream=place.stream,
                messages=state.messages,
                size_bytes=state.bytes,
                max_bytes=max(0, state.max_bytes),
                largest=dict(await self._housekeeping.holders(place)) if state.fill >= ALARMING else {},
            )
            for place, state in self._housekeeping.levels.items()
        ]
        return StorageView(streams=streams, warnings=self._housekeeping.warnings())

    async def _sweep(self, request: web.Request) -> web.Response:
        asked = query_of(request, Sweep)
        found = await self._housekeeping.sweep(dry_run=asked.dry_run, unused_for=timedelta(seconds=asked.unused_for_s))
        items = [
            GarbageView(region=place.region, stream=place.stream, what=g.pattern, messages=g.messages, reason=g.reason)
            for place, g in found
        ]
        return answer(GarbageViews(dry_run=asked.dry_run, items=items))

    @web.middleware
    async def refuse_new_things(self, request: web.Request, handler: Any) -> web.StreamResponse:
        """Keeps the rest of a log that is nearly full for what ends or undoes something."""
        if self._housekeeping.log_is_full and (request.method, local_path(request)) in NEW_THINGS:
            return problem(507, "the event log is nearly full", "Enlarge the hub's store (docs/kubernetes.md)", 75)
        response: web.StreamResponse = await handler(request)
        return response
