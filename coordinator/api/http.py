"""What every route needs: typed bodies, typed answers, pages, streams, and errors as problem details (RFC 9457)."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from importlib.metadata import version
from itertools import chain
from typing import Any, TypeVar

from aiohttp import http_exceptions, web
from pydantic import BaseModel, Field, ValidationError
from pydantic_core import from_json, to_json

from fedtide.coordinator.api.openapi import description
from fedtide.coordinator.api.routes import LINES, Route, get
from fedtide.coordinator.log.engine import Engine, views_of
from fedtide.fabric.errors import (
    ConfigError,
    Conflict,
    FedtideError,
    InvalidTransition,
    NotFound,
    StoreFull,
    TooLarge,
    TransientError,
)
from fedtide.fabric.flower.apps import MAX_BUNDLE_BYTES
from fedtide.fabric.ids import new_id
from fedtide.fabric.messages.people import PrincipalView, Role
from fedtide.fabric.messages.views import Page, Problem
from fedtide.fabric.strict import Strict
from fedtide.fabric.trace_context import TRACEPARENT, TraceContext
from fedtide.fabric.validation import checked, config_error

log = logging.getLogger(__name__)

MOST_BYTES = MAX_BUNDLE_BYTES + 1
"""Of a request's body."""

M = TypeVar("M", bound=BaseModel)
V = TypeVar("V", bound=BaseModel)

EVENTS = "text/event-stream"
BY = "Fedtide-By"
"""Header: who or what asks, for the log."""
PRINCIPAL: web.RequestKey[PrincipalView] = web.RequestKey("principal", PrincipalView)
"""Who asks, once that was found out."""
_STATUS: dict[type[FedtideError], int] = {NotFound: 404, ConfigError: 400, TooLarge: 413, Conflict: 409, StoreFull: 507}
_INTERNAL = 500


PREFIX: web.AppKey[str] = web.AppKey("prefix")
"""Below which path an application is served, if not at the root."""


def local_path(request: web.Request) -> str:
    """The path within the application that answers."""
    return request.path.removeprefix(request.app.get(PREFIX, ""))


def cookie_of(request: web.Request, name: str) -> str:
    """The name of this application's own cookie."""
    tenant = request.app.get(PREFIX, "").rpartition("/")[2]
    return f"{name}-{tenant}" if tenant else name


class Listing(Strict):
    """The query of a listing; each listing adds its own filters."""

    limit: int = Field(default=100, ge=1, le=10_000, description="Items of one page")
    after: str = Field(default="", max_length=200, description="`next` of the page before")


L = TypeVar("L", bound=Listing)


NEEDED: web.AppKey[dict[tuple[str, str], Role]] = web.AppKey("needed")
"""The role that a route needs, by method and path."""


def application(
    routes: Iterable[Iterable[Route]], checks: Sequence[Any] = (), around: Sequence[Any] = ()
) -> web.Application:
    """An application of these routes and of their description.

    Args:
        checks: middlewares that come first.
        around: such that see every answer, also refusals.
    """
    middlewares = [*around, _errors_as_problems, *checks, _unchanged]
    app = web.Application(client_max_size=MOST_BYTES, middlewares=middlewares)

    async def describe(_: web.Request) -> web.Response:
        return web.json_response(body=document, content_type="application/json")

    described = get("/v1/openapi.json", describe, "This description (OpenAPI 3.1)", is_open=True)
    served = [*chain.from_iterable(routes), described]
    document = to_json(description(served, version("fedtide")))
    app.add_routes(route.definition for route in served)
    app[NEEDED] = {(route.method, route.path): route.role for route in served}
    return app


def answer(view: BaseModel, status: int = 200) -> web.Response:
    return web.Response(body=view.model_dump_json().encode(), status=status, content_type="application/json")


def page_of(query: Listing, keys: Sequence[str], show: Callable[[str], V]) -> Page[V]:
    """One page of what `keys` name, in their order."""
    start = keys.index(query.after) + 1 if query.after in keys else 0
    if query.after and start == 0:
        raise ConfigError("after", f"{query.after!r} is not in this listing (any more)", "Begin without `after`")
    shown = keys[start : start + query.limit]
    more = start + len(shown) < len(keys)
    return Page(items=[show(k) for k in shown], total=len(keys), next=shown[-1] if more else "")


def query_of(request: web.Request, kind: type[M]) -> M:
    """The query as a model; raises ConfigError naming what is wrong."""
    return checked(kind, dict(request.query))


def name_in(request: web.Request, what: str) -> str:
    return str(request.match_info[what])


def key_of(request: web.Request, what: str) -> str:
    """The id of what a request starts: the same for a request that is sent again under one `Idempotency-Key`."""
    asked = request.headers.get("Idempotency-Key")
    return new_id(what) if not asked else f"{what}-{hashlib.sha256(text(asked).encode()).hexdigest()[:8]}"


def asker(request: web.Request) -> str:
    """Who or what asks: people and programs by their names, the installation's own token by what it is used for."""
    behalf = text(request.headers.get(BY, "api"))[:200]
    who = principal(request)
    return behalf if who is None or who.via in ("local token", "nobody asks") else f"{who.name} ({behalf})"[:200]


def principal(request: web.Request) -> PrincipalView | None:
    """Who asks, if that was found out."""
    return request.get(PRINCIPAL)


def trace_of(request: web.Request) -> str:
    """The trace that the caller works for, if it names one."""
    context = TraceContext.parse(request.headers.get(TRACEPARENT))
    return str(context) if context is not None else ""


def text(value: str) -> str:
    """A header as text; aiohttp keeps bytes that are no UTF-8 as lone surrogates."""
    return value.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


async def read_body(request: web.Request, kind: type[M]) -> M:
    """The request's JSON body as a model; raises ConfigError naming the field that is wrong."""
    try:
        return kind.model_validate_json(await request.read())
    except ValidationError as exc:
        raise config_error(exc, kind) from exc


def parse_json(path: str, body: bytes) -> Any:
    """Parse JSON from outside; lone surrogates and too deep nesting are refused.

    Raises:
        ConfigError: it is not JSON.
    """
    try:
        return from_json(body)
    except ValueError as exc:
        raise ConfigError(path, f"is not JSON: {exc}") from exc


async def stream(
    engine: Engine, request: web.Request, view: Callable[[], BaseModel], last: Callable[[], bool]
) -> web.StreamResponse:
    """`view()` now and at every change, until `last()` holds, as `Stream` writes it."""
    return await Stream.of(request, (snapshot async for snapshot in views_of(engine, view, last=last)))


class Stream:
    """Views one after the other: a line of JSON each, and an empty line at the end; or, for those who ask for
    `text/event-stream`, server-sent events (https://html.spec.whatwg.org/#server-sent-events), `end` being the last.
    """

    def __init__(self, request: web.Request) -> None:
        self._request = request
        self._is_events = EVENTS in request.headers.get("Accept", "")
        kind = EVENTS if self._is_events else LINES
        self.response = web.StreamResponse(headers={"Content-Type": kind, "Cache-Control": "no-store"})

    @classmethod
    async def of(cls, request: web.Request, views: AsyncIterator[BaseModel]) -> web.StreamResponse:
        stream_ = cls(request)
        await stream_.begin()
        async for view in views:
            await stream_.write(view)
        return await stream_.end()

    async def begin(self) -> None:
        await self.response.prepare(self._request)

    async def write(self, view: BaseModel) -> None:
        data = view.model_dump_json().encode()
        await self.response.write(b"data: " + data + b"\n\n" if self._is_events else data + b"\n")

    async def end(self) -> web.StreamResponse:
        await self.response.write(b"event: end\ndata:\n\n" if self._is_events else b"\n")
        await self.response.write_eof()
        return self.response


def problem(status: int, what: str, remedy: str = "", exit_code: int = 1) -> web.Response:
    body = Problem(title=_TITLES.get(status, "Refused"), status=status, detail=what, remedy=remedy, exit_code=exit_code)
    return web.Response(body=body.model_dump_json().encode(), status=status, content_type="application/problem+json")


_TITLES = {
    400: "The request is wrong",
    401: "Not allowed",
    403: "Not allowed",
    404: "Not found",
    409: "Not possible in this state",
    413: "Too large",
    500: "Internal error of the coordinator",
    503: "Not available now",
    507: "No room for this",
}


@web.middleware
async def _unchanged(request: web.Request, handler: Any) -> web.StreamResponse:
    """Give what can be asked for again an entity tag, and no body to those who have it (RFC 9110, 13.1.2)."""
    response: web.StreamResponse = await handler(request)
    if request.method != "GET" or response.status != 200 or not isinstance(response, web.Response):
        return response
    if isinstance(response.body, bytes):
        tag = hashlib.sha256(response.body).hexdigest()[:32]
        response.etag = tag
        if any(each.value in ("*", tag) for each in request.if_none_match or ()):
            return web.Response(status=304, headers={"ETag": f'"{tag}"'})
    return response


@web.middleware
async def _errors_as_problems(request: web.Request, handler: Any) -> web.StreamResponse:
    try:
        response: web.StreamResponse = await handler(request)
        return response
    except FedtideError as exc:
        return problem(_status_of(exc), exc.what, exc.remedy, exc.exit_code)
    except web.HTTPRedirection:
        raise
    except web.HTTPException as exc:
        return problem(exc.status, exc.text or exc.reason)
    except (http_exceptions.HttpProcessingError, web.RequestPayloadError, UnicodeError) as exc:
        return problem(400, f"the request cannot be read: {exc}")
    except Exception as exc:  # a request must get an answer, and one request must not end the process
        log.exception("api.failed", extra={"path": request.path})
        return problem(_INTERNAL, f"{type(exc).__name__}: {exc}", "See the coordinator's log", 70)


def _status_of(error: FedtideError) -> int:
    for kind, status in _STATUS.items():
        if isinstance(error, kind):
            return status
    if isinstance(error, TransientError):
        return 503
    return 409 if isinstance(error, InvalidTransition) else 400
