"""The API of what could not be applied or carried out: see it, try it again, drop it."""

from __future__ import annotations

from aiohttp import web

from fedtide.coordinator.api.http import Listing, answer, name_in, page_of, query_of
from fedtide.coordinator.api.routes import Route, delete, get, post
from fedtide.coordinator.executor import Executor, PendingCommand
from fedtide.coordinator.log.engine import Engine
from fedtide.coordinator.log.reports import Reports
from fedtide.fabric.errors import NotFound
from fedtide.fabric.messages.views import Page, ParkedView


class ParkedApi:
    """Reports are in the broker, commands in memory, events in the log."""

    def __init__(self, reports: Reports, executor: Executor, engine: Engine) -> None:
        self._reports = reports
        self._executor = executor
        self._engine = engine

    def routes(self) -> list[Route]:
        return [
            get("/v1/parked", self._all, "What could not be applied", Page[ParkedView], query=Listing),
            post("/v1/parked/{id}/retry", self._retry, "Try it again", ParkedView),
            delete("/v1/parked/{id}", self._drop, "Drop it", ParkedView),
        ]

    async def _views(self) -> dict[str, ParkedView]:
        found = [
            *(
                ParkedView(id=e.id, kind="event", at=e.time, subject="", reason=reason, what=e.data.kind)
                for e, reason in self._engine.left_out.values()
            ),
            *await self._reports.parked.all(),
            *(_command(order) for order in self._executor.parked.values()),
        ]
        return {view.id: view for view in found}

    async def _all(self, request: web.Request) -> web.Response:
        query, views = query_of(request, Listing), await self._views()
        return answer(page_of(query, list(views), views.__getitem__))

    async def _one(self, request: web.Request) -> ParkedView:
        wanted = name_in(request, "id")
        view = (await self._views()).get(wanted)
        if view is None:
            raise NotFound(f"nothing is parked under {wanted!r}", "See `fedtide events parked`")
        if view.kind == "event":
            raise NotFound(f"{wanted} is in the log: it can be neither tried again nor dropped", "Upgrade fedtide")
        return view

    async def _retry(self, request: web.Request) -> web.Response:
        view = await self._one(request)
        if view.kind == "command":
            self._executor.retry(view.id)
        else:
            await self._reports.retry(view.id)
        return answer(view)

    async def _drop(self, request: web.Request) -> web.Response:
        view = await self._one(request)
        if view.kind == "command":
            self._executor.parked.pop(view.id, None)
        else:
            await self._reports.parked.drop(view.id)
        return answer(view)


def _command(order: PendingCommand) -> ParkedView:
    assert order.parked_at is not None
    return ParkedView(
        id=order.id,
        kind="command",
        at=order.parked_at,
        subject=order.subject,
        reason=order.reason,
        what=order.name,
        cause=order.cause,
    )
