"""Forwards a standby's requests to the leader: for callers that cannot reach the leader's own address."""

from __future__ import annotations

import ssl
from collections.abc import Mapping
from pathlib import Path

import aiohttp
from aiohttp import web
from multidict import CIMultiDict

from fedtide.fabric.nats.credentials import trusting

_HOP_BY_HOP = ("host", "connection", "transfer-encoding", "content-length", "keep-alive", "upgrade")


class StandbyProxy:
    """Passes requests on, and streams the answers back.

    Args:
        ca: the authority that signed the leader's certificate; None where the API is plain http.
        server_name: the name in the leader's certificate, since requests go to its pod's address.
    """

    def __init__(self, ca: Path | None, server_name: str) -> None:
        self._tls: ssl.SSLContext | bool = trusting(ca) if ca is not None else True
        self._server_name = server_name or None
        self._session: aiohttp.ClientSession | None = None

    async def pass_on(self, leader: str, request: web.Request) -> web.StreamResponse:
        """Raises aiohttp.ClientError if the leader does not answer."""
        if self._session is None:
            limits = aiohttp.ClientTimeout(total=None, connect=5)
            self._session = aiohttp.ClientSession(timeout=limits, auto_decompress=False)
        async with self._session.request(
            request.method,
            f"{leader}{request.path_qs}",
            headers=_passed(request.headers),
            data=request.content if request.body_exists else None,
            allow_redirects=False,
            ssl=self._tls,
            server_hostname=self._server_name if leader.startswith("https:") else None,
        ) as answer:
            response = web.StreamResponse(status=answer.status, headers=_passed(answer.headers))
            await response.prepare(request)
            async for piece in answer.content.iter_any():
                await response.write(piece)
            await response.write_eof()
            return response

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()


def _passed(headers: Mapping[str, str]) -> CIMultiDict[str]:
    return CIMultiDict((k, v) for k, v in headers.items() if k.lower() not in _HOP_BY_HOP)
