"""The API of the event log: what happened, and what is happening."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from typing import Any

from aiohttp import web
from pydantic import Field

from fedtide.coordinator.api.http import Stream, answer, name_in, query_of
from fedtide.coordinator.api.routes import LINES, Route, get
from fedtide.coordinator.executor import Executor
from fedtide.coordinator.log import history
from fedtide.coordinator.log.engine import Engine
from fedtide.coordinator.log.event_log import EventLog
from fedtide.fabric.events.envelope import Event
from fedtide.fabric.events.runs import RunRequested
from fedtide.fabric.messages.views import EventView, HistoryEntry, Page, WhyView
from fedtide.fabric.strict import Strict

MAX_LIMIT = 10_000


class EventFilter(Strict):
    kind: str = Field(default="", description="A trailing * matches any end")
    about: str = Field(default="", description="A run, roll-out, node, model or rule")

    def admits(self, event: Event) -> bool:
        kind = event.data.kind
        of_kind = kind.startswith(self.kind[:-1]) if self.kind.endswith("*") else self.kind in ("", kind)
        return of_kind and (not self.about or self.about in history.names_of(event))


class EventListing(EventFilter):
    limit: int = Field(default=50, ge=1, le=MAX_LIMIT, description="At most this many events: the newest")
    after: int | None = Field(default=None, ge=1, description="`next` of the page before: goes on with older ones")


class WhyOptions(Strict):
    limit: int = Field(default=40, ge=1, le=MAX_LIMIT)
    round: int | None = Field(default=None, ge=0, le=1_000_000_000)


class EventApi:
    """Reads the log; changes nothing."""

    def __init__(self, engine: Engine, log: Callable[[], EventLog], executor: Executor) -> None:
        self._engine = engine
        self._log = log
        self._executor = executor

    def routes(self) -> list[Route]:
        return [
            get("/v1/events", self._query, "The event log", Page[EventView], query=EventListing),
            get(
                "/v1/events/watch", self._watch, "Events as they are logged", EventView, query=EventFilter, media=LINES
            ),
            get("/v1/why/{name}", self._why, "Why something is as it is", WhyView, query=WhyOptions),
        ]

    async def _query(self, request: web.Request) -> web.Response:
        return answer(await self.page(query_of(request, EventListing)))

    async def page(self, query: EventListing) -> Page[EventView]:
        """The newest events, oldest first."""
        newest: list[EventView] = []
        more = ""
        async for sequence, event in self._log().newest_first(query.after):
            if query.admits(event):
                newest.append(view(event))
                if len(newest) == query.limit:
                    more = str(sequence) if sequence > 1 else ""
                    break
        return Page(items=newest[::-1], total=len(newest), next=more)

    async def _why(self, request: web.Request) -> web.Response:
        return answer(await self.why(name_in(request, "name"), query_of(request, WhyOptions)))

    async def why(self, name: str, asked: WhyOptions) -> WhyView:
        now = history.present(self._engine.world, name, asked.round)
        now += [f"not carried out: {o.name}: {o.reason} ({o.id})" for o in self._executor.parked_about(name)]
        newest: list[HistoryEntry] = []
        async for _, event in self._log().newest_first():
            newest += history.history([event], name, asked.round)
            if len(newest) >= asked.limit or (isinstance(event.data, RunRequested) and event.data.run == name):
                break
        return WhyView(present=now, because=newest[::-1])

    async def _watch(self, request: web.Request) -> web.StreamResponse:
        wanted = query_of(request, EventFilter)
        stream = Stream(request)
        await stream.begin()
        events: asyncio.Queue[Event] = asyncio.Queue(maxsize=MAX_LIMIT)
        with self._engine.listening(events):
            while True:
                event = await events.get()
                if wanted.admits(event):
                    await stream.write(view(event))


SEALED = {"sealed", "nonce"}
"""Of tenants: nothing that anybody can use, and long."""


def view(event: Event) -> EventView:
    return EventView(
        id=event.id,
        source=event.source,
        time=event.time,
        kind=event.data.kind,
        what=history.sentence(event),
        data=_finite(event.data.model_dump(mode="json", exclude=SEALED)),
    )


def _finite(value: Any) -> Any:
    """The same with None for NaN and infinity, which JSON does not have."""
    match value:
        case float() if not math.isfinite(value):
            return None
        case dict():
            return {k: _finite(v) for k, v in value.items()}
        case list():
            return [_finite(v) for v in value]
        case _:
            return value
