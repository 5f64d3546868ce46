"""Access to the API: callers must show the installation's token, and come from no page of another site."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from aiohttp import web

from fedtide.coordinator.api.http import problem
from fedtide.coordinator.config import CoordinatorConfig
from fedtide.fabric.process.web_access import COOKIE, TokenFile, why_foreign

OPEN = ("/healthz", "/metrics", "/v1/openapi.json", "/ui/login")
"""Paths that probes, scrapers and strangers read without a token."""
STATIC, PAGE = "/ui/static/", "/ui"


ORIGIN_ASKS = "WebHook-Request-Origin"


def is_handshake(request: web.Request) -> bool:
    """Whether a sender of events asks if it may deliver them: it has no token yet, and gets nothing but a yes."""
    return request.method == "OPTIONS" and request.path == "/v1/events" and ORIGIN_ASKS in request.headers


def _shown(request: web.Request) -> Mapping[str, str]:
    """The headers with the token; a page's own requests have it in a cookie."""
    kept = request.cookies.get(COOKIE)
    return (
        request.headers if kept is None or "Authorization" in request.headers else {"Authorization": f"Bearer {kept}"}
    )


def access_middleware(config: CoordinatorConfig) -> list[Any]:
    """The middleware that checks each request before any route sees it.

    Raises:
        ConfigError: the token cannot be read, or is empty.
    """
    token = TokenFile(config.http_token_file) if config.http_token_file is not None else None

    @web.middleware
    async def check(request: web.Request, handler: Any) -> web.StreamResponse:
        is_login = request.method == "POST" and request.path == "/ui/login"
        headers = {k: v for k, v in request.headers.items() if not (is_login and k.lower() == "content-type")}
        if (reason := why_foreign(headers, listens_on=config.http_host)) is not None:
            return problem(403, reason, "Call it from a program, with application/json", 77)
        is_open = request.path in OPEN or request.path.startswith(STATIC) or is_handshake(request)
        if token is not None and not is_open and not token.shown_by(_shown(request)):
            if request.path == "/" or request.path == PAGE or request.path.startswith(f"{PAGE}/"):
                depth = request.path.count("/") - 2
                raise web.HTTPSeeOther("ui/login" if depth < 0 else "../" * depth + "login")
            return problem(401, "the API token is missing or wrong", "Set FEDTIDE_TOKEN", 77)
        response: web.StreamResponse = await handler(request)
        return response

    return [check]
