"""What goes into the audit trail of the API's calls, and how it is read."""

from __future__ import annotations

import hashlib
import json
import re
import time
from datetime import datetime
from ipaddress import ip_network
from typing import Any

from aiohttp import web
from pydantic import Field

from fedtide.coordinator.adapters.audit import AuditTrail
from fedtide.coordinator.api.http import BY, Listing, answer, local_path, principal, query_of, text
from fedtide.coordinator.api.routes import Route, get
from fedtide.fabric.messages.people import AuditEntry
from fedtide.fabric.messages.views import Page

LOOKING = ("GET", "HEAD", "OPTIONS")
LONGEST_SHOWN = 2000
_SECRET = re.compile(
    r"token|secret|passw|passphrase|seed|api_?key|access_?key|private_?key|credential|authorization|^files$",
    re.IGNORECASE,
)
_USERINFO = re.compile(r"//[^/@\s\"]+@")
TOLD_AGAIN_S, MOST_TOLD = 60.0, 100
"""So often, at most, it is told that somebody was not let in or may not look at something, and of so many in that time:
nobody fills the trail with that."""
LOGINS = (("POST", "/ui/login"), ("GET", "/ui/oidc/callback"))
_NOT_LET_IN, _REFUSED = 401, 403


class AuditListing(Listing):
    """`after`: the number of the last entry of the page before."""

    who: str = ""
    action: str = Field(default="", description="Part of method and path")
    since: datetime | None = None
    until: datetime | None = None


def audit_middleware(trail: AuditTrail) -> list[Any]:
    """The middleware that stores what was asked for and what became of it, before the answer goes."""
    news = _News()

    async def tell(request: web.Request, status: int, *, asked: str, reason: str) -> None:
        who = principal(request)
        await trail.append(
            who=who.name if who is not None else "nobody",
            role=who.role if who is not None else "",
            via=who.via if who is not None else "",
            origin=request.remote or "",
            behalf=text(request.headers.get(BY, ""))[:200],
            action=f"{request.method} {local_path(request)}"[:300],
            asked=asked,
            outcome=str(status),
            reason=reason,
        )

    @web.middleware
    async def record(request: web.Request, handler: Any) -> web.StreamResponse:
        try:
            response: web.StreamResponse = await handler(request)
        except web.HTTPRedirection:
            if _is_login(request):
                status = 200 if principal(request) is not None else _NOT_LET_IN
                if news.is_told(request, status):  # what was asked is a token, or buys one
                    await tell(request, status, asked="", reason="" if status == 200 else "not let in")
            raise
        if local_path(request).startswith("/v1/") and news.is_told(request, response.status):
            # Of a stranger nothing is read, and nothing kept.
            asked = await _asked(request) if response.status != _NOT_LET_IN else ""
            await tell(request, response.status, asked=asked, reason=_reason(response))
        return response

    return [record]


class _News:
    """Which requests are told of: those that change something and logins always, those that were not let in rarely."""

    def __init__(self) -> None:
        self._strangers: dict[str, float] = {}
        self._people: dict[str, float] = {}

    def is_told(self, request: web.Request, status: int) -> bool:
        who = principal(request)
        if status == _NOT_LET_IN:
            return _is_new(self._strangers, _network(request.remote or ""))
        if status == _REFUSED and request.method in LOOKING:
            return who is not None and _is_new(self._people, who.name)
        return request.method not in LOOKING or _is_login(request)


def _is_new(told: dict[str, float], who: str) -> bool:
    now = time.monotonic()
    for each in [each for each, at in told.items() if now >= at + TOLD_AGAIN_S]:
        del told[each]
    return len(told) < MOST_TOLD and told.setdefault(who, now) == now


def _network(address: str) -> str:
    """An address, or the network that one subscriber has of the newer kind (a /64, RFC 6177)."""
    try:
        return str(ip_network((address, 64), strict=False)) if ":" in address else address
    except ValueError:
        return address


def _is_login(request: web.Request) -> bool:
    return (request.method, local_path(request)) in LOGINS


async def _asked(request: web.Request) -> str:
    """The body, without what is secret; of one that is long, or no JSON, its digest."""
    try:
        body = await request.read()
    except (web.HTTPException, OSError, RuntimeError):
        return ""
    body = body or json.dumps(dict(request.query)).encode() if body or request.query else b""
    if not body:
        return ""
    try:
        shown = _USERINFO.sub("//...@", json.dumps(_without_secrets(json.loads(body))))
    except (ValueError, RecursionError):
        shown = ""
    if shown and len(shown) <= LONGEST_SHOWN:
        return shown
    return f"{len(body)} bytes, sha256 {hashlib.sha256(body).hexdigest()}"


def _without_secrets(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: "..." if _SECRET.search(str(k)) else _without_secrets(v) for k, v in value.items()}
    return [_without_secrets(each) for each in value] if isinstance(value, list) else value


def _reason(response: web.StreamResponse) -> str:
    if response.status < 400 or not isinstance(response, web.Response) or not isinstance(response.body, bytes):
        return ""
    try:
        return str(json.loads(response.body).get("detail", ""))[:1000]
    except (ValueError, AttributeError):
        return ""


class AuditApi:
    """Reads the trail; nothing changes it."""

    def __init__(self, trail: AuditTrail) -> None:
        self._trail = trail

    def routes(self) -> list[Route]:
        return [
            get("/v1/audit", self._query, "The audit trail", Page[AuditEntry], query=AuditListing, needs="admin"),
        ]

    async def _query(self, request: web.Request) -> web.Response:
        query = query_of(request, AuditListing)
        first = int(query.after) + 1 if query.after.isascii() and query.after.isdecimal() else 1
        items: list[AuditEntry] = []
        more = False
        async for entry in self._trail.entries(first):
            if not _fits(entry, query):
                continue
            more = len(items) == query.limit
            if more:
                break
            items.append(entry)
        return answer(
            Page[AuditEntry](items=items, total=len(items), next=str(items[-1].number) if more and items else "")
        )


def _fits(entry: AuditEntry, query: AuditListing) -> bool:
    begun = query.since is None or entry.at >= query.since
    ended = query.until is None or entry.at < query.until
    return begun and ended and query.who.lower() in entry.who.lower() and query.action.lower() in entry.action.lower()
