"""Access to the API: callers must show the installation's token, and come from no page of another site."""

from __future__ import annotations

from typing import Any

from aiohttp import web

from fedtide.coordinator.api.http import problem
from fedtide.coordinator.config import CoordinatorConfig
from fedtide.fabric.process.web_access import TokenFile, why_foreign

OPEN = ("/healthz", "/metrics")
"""Paths that probes and scrapers read without a token."""


ORIGIN_ASKS = "WebHook-Request-Origin"


def is_handshake(request: web.Request) -> bool:
    """Whether a sender of events asks if it may deliver them: it has no token yet, and gets nothing but a yes."""
    return request.method == "OPTIONS" and request.path == "/v1/events" and ORIGIN_ASKS in request.headers


def access_middleware(config: CoordinatorConfig) -> list[Any]:
    """The middleware that checks each request before any route sees it.

    Raises:
        ConfigError: the token cannot be read, or is empty.
    """
    token = TokenFile(config.http_token_file) if config.http_token_file is not None else None

    @web.middleware
    async def check(request: web.Request, handler: Any) -> web.StreamResponse:
        if (reason := why_foreign(request.headers, listens_on=config.http_host)) is not None:
            return problem(403, reason, "Call it from a program, with application/json", 77)
        is_open = request.path in OPEN or is_handshake(request)
        if token is not None and not is_open and not token.shown_by(request.headers):
            return problem(401, "the API token is missing or wrong", "Set FEDTIDE_TOKEN", 77)
        response: web.StreamResponse = await handler(request)
        return response

    return [check]
