"""Routes with their types: what serves a request, and what its description in OpenAPI is made of. Pure data."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from aiohttp import web
from pydantic import BaseModel

from fedtide.fabric.messages.people import Role

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
BYTES = "application/octet-stream"
LINES = "application/x-ndjson"
TEXT = "text/plain"


@dataclass(frozen=True, slots=True)
class Route:
    """One operation. `media`: of the answer, if that is not JSON. `takes`: the media type of a body that is not JSON.

    `answers` of a stream (media LINES): one line of it.
    """

    method: str
    path: str
    handler: Handler
    summary: str
    answers: type[BaseModel] | None = None
    query: type[BaseModel] | None = None
    body: type[BaseModel] | None = None
    status: int = 200
    media: str = "application/json"
    takes: str = ""
    is_open: bool = False
    """Needs no token."""
    needs: Role | None = None
    """None: a viewer may look, an operator may change something."""

    @property
    def role(self) -> Role:
        return self.needs or ("viewer" if self.method == "GET" else "operator")

    @property
    def definition(self) -> web.RouteDef:
        return web.route(self.method, self.path, self.handler)


get, post, put, delete = (partial(Route, method) for method in ("GET", "POST", "PUT", "DELETE"))


def each(route: Route, name: str, values: dict[str, Handler]) -> list[Route]:
    """One route for each value of a word of its path, with its handler; `{name}` in the summary becomes the value."""
    return [
        replace(
            route,
            path=route.path.replace(f"<{name}>", value),
            summary=route.summary.replace(f"<{name}>", value),
            handler=handler,
        )
        for value, handler in values.items()
    ]


def words(route: Route) -> list[str]:
    """The names in a route's path."""
    return [part[1:-1] for part in route.path.split("/") if part.startswith("{")]


def operation_id(route: Route) -> str:
    """A name for client generators, unique and stable: `get_runs_run_watch`."""
    parts: list[Any] = [part.strip("{}").replace("-", "_") for part in route.path.split("/") if part not in ("", "v1")]
    return "_".join([route.method.lower(), *parts])
