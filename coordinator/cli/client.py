"""The API's client: plain HTTP, JSON in and out, errors as our own."""

from __future__ import annotations

import http.client
import json
import os
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import urlsplit

from coordinator.embedded.home import Home
from fabric.errors import FedtideError, NotFound, TransientError

SERVER = "FEDTIDE_SERVER"
TIMEOUT_S = 60.0


class ApiError(FedtideError):
    """The coordinator refused; it said why and how to exit."""

    def __init__(self, what: str, remedy: str, exit_code: int) -> None:
        super().__init__(what, remedy)
        self.exit_code = exit_code


class Client:
    """Calls one coordinator."""

    def __init__(self, url: str) -> None:
        self._url = url
        parts = urlsplit(url)
        if parts.scheme != "http" or parts.hostname is None:
            raise NotFound(f"{url!r} is not an http URL", f"Set {SERVER}, for example to http://127.0.0.1:8080")
        self._host, self._port = parts.hostname, parts.port or 80

    @classmethod
    def find(cls) -> Client:
        """`$FEDTIDE_SERVER`, or the installation that is up in the present home."""
        return cls(os.environ.get(SERVER) or Home.find().state().api)

    def get(self, path: str) -> Any:
        return json.loads(self.call("GET", path))

    def post(self, path: str, body: object) -> Any:
        return json.loads(self.call("POST", path, json.dumps(body).encode()))

    def call(
        self, method: str, path: str, body: bytes | None = None, headers: Mapping[str, str] | None = None
    ) -> bytes:
        """One request; the answer's bytes.

        Raises:
            ApiError: the coordinator refused.
            TransientError: nobody answers there.
        """
        connection, response = self._open(method, path, body, headers)
        try:
            return response.read()
        finally:
            connection.close()

    def stream(self, path: str) -> Iterator[Any]:
        """The objects of a watch, as they come, until it ends."""
        connection, response = self._open("GET", path, None, timeout_s=None)
        try:
            while line := response.readline():
                yield json.loads(line)
        finally:
            connection.close()

    def _open(
        self,
        method: str,
        path: str,
        body: bytes | None,
        headers: Mapping[str, str] | None = None,
        timeout_s: float | None = TIMEOUT_S,
    ) -> tuple[http.client.HTTPConnection, http.client.HTTPResponse]:
        connection = http.client.HTTPConnection(self._host, self._port, timeout=timeout_s)
        try:
            connection.request(method, path, body, dict(headers or {}))
            response = connection.getresponse()
        except OSError as exc:
            connection.close()
            raise TransientError(f"no coordinator answers at {self._url}", "Is it up? See `fedtide status`") from exc
        if response.status >= 400:
            refusal = _refusal(response.read())
            connection.close()
            raise ApiError(refusal.get("error", "refused"), refusal.get("remedy", ""), refusal.get("exit_code", 1))
        return connection, response


def _refusal(body: bytes) -> dict[str, Any]:
    try:
        parsed: dict[str, Any] = json.loads(body)
    except ValueError:
        return {"error": body.decode(errors="replace")[:200]}
    return parsed
