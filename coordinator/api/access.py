"""Access to the API: who asks, whether that is enough, and that no page of another site does."""

from __future__ import annotations

from typing import Any

from aiohttp import web

from fedtide.coordinator.adapters.oidc import NotLetIn
from fedtide.coordinator.api.http import NEEDED, PREFIX, PRINCIPAL, cookie_of, local_path, problem
from fedtide.coordinator.api.principals import Principals, is_enough
from fedtide.fabric.messages.people import Role
from fedtide.fabric.process.web_access import COOKIE, why_foreign

METRICS = "/metrics"
"""Open to the scraper of the installation's owner; of a tenant, only those who may look at it."""
OPEN = ("/healthz", METRICS, "/v1/openapi.json", "/v1/login", "/ui/login", "/ui/oidc", "/ui/oidc/callback")
"""Paths that probes, scrapers and strangers read without a token."""
STATIC, PAGE = "/ui/static/", "/ui"


ORIGIN_ASKS = "WebHook-Request-Origin"


def is_handshake(request: web.Request) -> bool:
    """Whether a sender of events asks if it may deliver them: it has no token yet, and gets nothing but a yes."""
    return request.method == "OPTIONS" and local_path(request) == "/v1/events" and ORIGIN_ASKS in request.headers


def shown(request: web.Request) -> dict[str, str]:
    """The header with the token; a page's own requests have it in a cookie."""
    kept = request.cookies.get(cookie_of(request, COOKIE))
    if kept is not None and "Authorization" not in request.headers:
        return {"Authorization": f"Bearer {kept}"}
    return {"Authorization": request.headers.get("Authorization", "")}


def needed(request: web.Request) -> Role:
    """The role that a request needs. The page looks only; what it changes it asks the API for."""
    usual: Role = "viewer" if request.method in ("GET", "HEAD") else "operator"
    resource = request.match_info.route.resource
    path = resource.canonical if resource is not None else local_path(request)
    method = "GET" if request.method == "HEAD" else request.method  # aiohttp answers both with one handler
    return request.app[NEEDED].get((method, path), usual)


def access_middleware(principals: Principals, listens_on: str) -> list[Any]:
    """The middleware that checks each request before any route sees it.

    Args:
        listens_on: the address that the server is bound to.
    """

    @web.middleware
    async def check(request: web.Request, handler: Any) -> web.StreamResponse:
        is_login = request.method == "POST" and local_path(request) == "/ui/login"
        headers = {k: v for k, v in request.headers.items() if not (is_login and k.lower() == "content-type")}
        if (reason := why_foreign(headers, listens_on=listens_on)) is not None:
            return problem(403, reason, "Call it from a program, with application/json", 77)
        is_open = local_path(request) in OPEN and not (request.app.get(PREFIX) and local_path(request) == METRICS)
        if is_open or local_path(request).startswith(STATIC) or is_handshake(request):
            response: web.StreamResponse = await handler(request)
            return response
        try:
            who = await principals.of(shown(request))
        except NotLetIn as exc:
            who, reason = None, exc.what
        if who is None:
            if local_path(request) == "/" or local_path(request) == PAGE or local_path(request).startswith(f"{PAGE}/"):
                depth = local_path(request).count("/") - 2
                raise web.HTTPSeeOther("ui/login" if depth < 0 else "../" * depth + "login")
            how = "fedtide login, or set FEDTIDE_TOKEN" if principals.oidc is not None else "Set FEDTIDE_TOKEN"
            return problem(401, reason or "the API token is missing or wrong", how, 77)
        request[PRINCIPAL] = who
        if not is_enough(who.role, role := needed(request)):
            return problem(403, f"{who.name} is {who.role}, and this needs {role}", "Ask an admin of it", 77)
        answered: web.StreamResponse = await handler(request)
        return answered

    return [check]
