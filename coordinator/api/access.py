"""Access to the API: callers must show the installation's token, if there is one."""

from __future__ import annotations

import hmac
from pathlib import Path
from typing import Any

from aiohttp import web

from fedtide.coordinator.api.http import problem
from fedtide.fabric.errors import ConfigError

OPEN = ("/healthz", "/metrics")
"""Paths that probes and scrapers read without a token."""


def token_middleware(file: Path | None) -> list[Any]:
    """The middleware that checks the token in `file`; none without a file.

    Raises:
        ConfigError: it cannot be read, or is empty.
    """
    if file is None:
        return []
    try:
        wanted = file.read_text(encoding="utf-8").strip().encode()
    except OSError as exc:
        raise ConfigError("http_token_file", f"{file} cannot be read: {exc.strerror}") from exc
    if not wanted:
        raise ConfigError("http_token_file", f"{file} is empty")

    @web.middleware
    async def check(request: web.Request, handler: Any) -> web.StreamResponse:
        scheme, _, shown = request.headers.get("Authorization", "").partition(" ")
        given = shown.strip().encode("utf-8", "surrogateescape")
        right = scheme.lower() == "bearer" and hmac.compare_digest(given, wanted)
        if not right and request.path not in OPEN:
            return problem(401, "the API token is missing or wrong", "Set FEDTIDE_TOKEN", 77)
        response: web.StreamResponse = await handler(request)
        return response

    return [check]
