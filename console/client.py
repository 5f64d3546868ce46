"""The API's client: plain HTTP, JSON in and out, errors as our own."""

from __future__ import annotations

import http.client
import json
import os
import secrets
import ssl
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, urlsplit

from fedtide.console.embedded.home import Home
from fedtide.fabric.errors import ConfigError, FedtideError, NotFound, TransientError
from fedtide.fabric.nats.credentials import trusting

SERVER = "FEDTIDE_SERVER"
CA = "FEDTIDE_CA"
"""File of the authority whose certificate an https server has; without it those that the machine trusts."""
TOKEN = "FEDTIDE_TOKEN"  # noqa: S105  # the name of a variable
TIMEOUT_S = 60.0
ANSWER_WITHIN_S = 5.0
"""One of several coordinators may be frozen: then another is asked."""
FAIL_OVER_S = 15.0
"""How long one of several coordinators may take to lead."""


class ApiError(FedtideError):
    """The coordinator refused; it said why and how to exit."""

    def __init__(self, what: str, remedy: str, exit_code: int) -> None:
        super().__init__(what, remedy)
        self.exit_code = exit_code


class Client:
    """Calls the coordinator that leads: any of `urls` knows the way."""

    def __init__(self, *urls: str) -> None:
        self._urls = urls
        for url in urls:
            if urlsplit(url).scheme not in ("http", "https") or urlsplit(url).hostname is None:
                raise NotFound(
                    f"{url!r} is not an http or https URL", f"Set {SERVER}, for example to http://127.0.0.1:8080"
                )

    @classmethod
    def find(cls) -> Client:
        """`$FEDTIDE_SERVER` (one or more, by commas), or the installation that is up in the present home."""
        named = os.environ.get(SERVER)
        return cls(*(named.split(",") if named else Home.find().state().apis))

    def get(self, path: str) -> Any:
        return json.loads(self.call("GET", path))

    def post(self, path: str, body: object, key: str = "") -> Any:
        """With the same `key` a second request starts nothing a second time."""
        # Sent again to another coordinator it must not start a second run.
        headers = {"Idempotency-Key": key or secrets.token_hex(8)}
        return json.loads(self.call("POST", path, json.dumps(body).encode(), headers))

    def put(self, path: str, body: object) -> Any:
        return json.loads(self.call("PUT", path, json.dumps(body).encode()))

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

    def stream(self, path: str, timeout_s: float | None = None) -> Iterator[Any]:
        """The objects of a watch, as they come, until it ends; it goes on with whoever leads when it is cut off.

        Args:
            timeout_s: after so many seconds it ends too.
        """
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while deadline is None or time.monotonic() < deadline:
            left = None if deadline is None else max(0.1, deadline - time.monotonic())
            connection, response = self._open("GET", path, None, timeout_s=left, patient=True)
            try:
                while line := response.readline():
                    if line == b"\n":
                        return
                    yield json.loads(line)
            except (OSError, http.client.HTTPException, ValueError):
                continue
            finally:
                connection.close()

    def _open(
        self,
        method: str,
        path: str,
        body: bytes | None,
        headers: Mapping[str, str] | None = None,
        timeout_s: float | None = TIMEOUT_S,
        *,
        patient: bool = False,
    ) -> tuple[http.client.HTTPConnection, http.client.HTTPResponse]:
        deadline = time.monotonic() + FAIL_OVER_S
        while True:
            for url in self._urls:
                answer_s = ANSWER_WITHIN_S if len(self._urls) > 1 else timeout_s
                answer = _ask(url, method, path, body, dict(headers or {}), answer_s, timeout_s)
                if answer is not None:
                    return answer
            if (len(self._urls) == 1 and not patient) or time.monotonic() > deadline:
                where = " or ".join(self._urls)
                raise TransientError(f"no coordinator answers at {where}", "Is it up? See `fedtide status`")
            time.sleep(0.2)  # nothing tells a client that a coordinator has come back: it has to ask


def _ask(
    url: str,
    method: str,
    path: str,
    body: bytes | None,
    headers: dict[str, str],
    answer_s: float | None,
    timeout_s: float | None,
) -> tuple[http.client.HTTPConnection, http.client.HTTPResponse] | None:
    """One coordinator's answer, or that of the leader that it names; None if neither leads.

    Args:
        answer_s: how long the beginning of its answer is waited for.
        timeout_s: how long any later part of it may take.
    """
    parts = urlsplit(url)
    connection = _connection(parts, answer_s)
    try:
        connection.request(method, path, body, {**headers, **_token()})
        response = connection.getresponse()
        if connection.sock is not None:
            connection.sock.settimeout(timeout_s)
    except ssl.SSLCertVerificationError as exc:
        connection.close()
        raise ConfigError(
            url, f"its certificate is not trusted: {exc.verify_message}", f"Set {CA} to its ca.crt"
        ) from exc
    except OSError:
        connection.close()
        return None
    if response.status == 307:
        connection.close()
        leader = response.headers["Location"].removesuffix(path)
        return _ask(leader, method, path, body, headers, answer_s, timeout_s) if leader != url else None
    if response.status == 503 and "Retry-After" in response.headers:
        connection.close()
        return None
    if response.status >= 400:
        refusal = _refusal(response.read())
        connection.close()
        raise ApiError(refusal.get("error", "refused"), refusal.get("remedy", ""), refusal.get("exit_code", 1))
    return connection, response


def _connection(parts: SplitResult, timeout_s: float | None) -> http.client.HTTPConnection:
    host = parts.hostname or ""
    if parts.scheme == "http":
        return http.client.HTTPConnection(host, parts.port or 80, timeout=timeout_s)
    ca = os.environ.get(CA)
    context = trusting(Path(ca)) if ca else ssl.create_default_context()
    return http.client.HTTPSConnection(host, parts.port or 443, timeout=timeout_s, context=context)


def _token() -> dict[str, str]:
    token = os.environ.get(TOKEN)
    return {"Authorization": f"Bearer {token}"} if token else {}


def _refusal(body: bytes) -> dict[str, Any]:
    try:
        parsed: dict[str, Any] = json.loads(body)
    except ValueError:
        return {"error": body.decode(errors="replace")[:200]}
    return parsed
