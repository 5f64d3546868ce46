"""The API's client, sync and async, on httpx: finds the coordinator that leads, and waits while another takes over.

Requests and the decoding of answers are in `endpoints`; the servers that may be called are in `servers`.
"""

from __future__ import annotations

import secrets
import ssl
import time
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping
from typing import Any, TypeVar, cast
from urllib.parse import urlsplit

import httpx
import stamina
from pydantic import ValidationError
from pydantic_core import from_json
from stamina.instrumentation import set_on_retry_hooks

from fedtide.console import endpoints
from fedtide.console.endpoints import Call
from fedtide.console.home import Home
from fedtide.console.servers import CA, SERVER, Servers
from fedtide.fabric.errors import ConfigError, FedtideError, TransientError
from fedtide.fabric.messages.views import Page, Problem
from fedtide.fabric.nats.credentials import trusting

T = TypeVar("T")

TIMEOUT_S = 60.0
READ_TIMEOUT_S = 15.0
"""For calls that only read: a server that accepts them and says nothing is given up earlier."""
ANSWER_WITHIN_S = 5.0
"""Seconds for an answer if there are several coordinators: one may be frozen, then another is asked."""
FAIL_OVER_S = 15.0
"""How long to wait for one of several coordinators to become the leader."""


_LIMITS = httpx.Limits(max_keepalive_connections=0)
"""No connection is kept: the next call may have to go to another leader."""


set_on_retry_hooks([])  # what a command prints is for people: a wait is said by its outcome


class ApiError(FedtideError):
    """The coordinator refused; its answer holds the reason and the exit code."""

    def __init__(self, what: str, remedy: str, exit_code: int, status: int) -> None:
        super().__init__(what, remedy)
        self.exit_code = exit_code
        self.status = status


class NoLeader(TransientError):
    """None of the servers leads or answers."""


class Client:
    """Calls the API; every coordinator of the installation knows who leads."""

    def __init__(self, servers: Servers, by: str = "cli") -> None:
        self._servers = servers
        self._by = by
        self._http = httpx.Client(verify=_tls(servers), trust_env=False, limits=_LIMITS)

    @classmethod
    def find(cls, by: str = "cli") -> Client:
        """A client for the servers in the environment, or for the installation that is up in the current home."""
        return cls(Servers.find(), by)

    @classmethod
    def of(cls, home: Home, urls: Iterable[str], by: str = "cli") -> Client:
        """For the servers of the installation of a home."""
        return cls(Servers.of(home, urls), by)

    @classmethod
    def at(cls, *urls: str, by: str = "cli") -> Client:
        """For these servers, without a token."""
        return cls(Servers(urls), by)

    def send(self, call: Call[T], *, key: str = "", timeout_s: float | None = None) -> T:
        """One call's answer.

        Args:
            key: idempotency key: a second request with the same key starts nothing.
            timeout_s: seconds to wait for the answer; None: as suits the call.

        Raises:
            ApiError: the coordinator refused.
            TransientError: no coordinator answers.
        """
        headers = _headers(self._servers, call, self._by, key)
        response = self._ask(
            call, headers, _limits(self._servers, call, timeout_s), patient=len(self._servers.urls) > 1
        )
        return _read(call, response)

    def every(self, listing: Call[Page[T]], limit: int | None = None) -> Iterator[T]:
        """The items of a listing, page by page, up to `limit`."""
        page, left = self.send(listing), limit
        while True:
            shown = page.items if left is None else page.items[:left]
            yield from shown
            left = None if left is None else left - len(shown)
            if not page.next or left == 0:
                return
            page = self.send(endpoints.next_page(listing, page.next))

    def stream(self, call: Call[T], timeout_s: float | None = None) -> Iterator[T]:
        """The views of a watch, until it ends; a broken stream is continued with the current leader.

        Args:
            timeout_s: seconds after which the stream ends in any case.
        """
        headers = _headers(self._servers, call, self._by, "")
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while deadline is None or time.monotonic() < deadline:
            left = None if deadline is None else max(0.1, deadline - time.monotonic())
            response = self._ask(call, headers, httpx.Timeout(ANSWER_WITHIN_S, read=left, pool=left), patient=True)
            try:
                for line in response.iter_lines():
                    if not line:
                        return
                    yield _view(call, line)
            except httpx.HTTPError:
                continue
            finally:
                response.close()

    def _ask(
        self, call: Call[Any], headers: Mapping[str, str], limits: httpx.Timeout, *, patient: bool
    ) -> httpx.Response:
        """The leader's answer, its body not yet read; the caller closes it."""
        for attempt in _until_somebody_leads(limits, patient=patient):
            with attempt:
                route = _Route(self._servers)
                while (url := route.next()) is not None:
                    try:
                        response = self._http.send(_request(self._http, call, url, headers, limits), stream=True)
                    except httpx.HTTPError as exc:
                        _raise_if_hopeless(exc, url)
                        continue
                    if route.is_answer(url, response):
                        if response.status_code >= 400:
                            response.read()
                            response.close()
                            raise _refusal(response)
                        return response
                    response.close()
                raise _nobody(self._servers)
        raise _nobody(self._servers)

    def close(self) -> None:
        self._http.close()


class AsyncClient:
    """As `Client`, for asyncio."""

    def __init__(self, servers: Servers, by: str = "api") -> None:
        self._servers = servers
        self._by = by
        self._http = httpx.AsyncClient(verify=_tls(servers), trust_env=False, limits=_LIMITS)

    @classmethod
    def find(cls, by: str = "api") -> AsyncClient:
        """As `Client.find`."""
        return cls(Servers.find(), by)

    async def send(self, call: Call[T], *, key: str = "", timeout_s: float | None = None) -> T:
        """As `Client.send`."""
        headers = _headers(self._servers, call, self._by, key)
        limits, patient = _limits(self._servers, call, timeout_s), len(self._servers.urls) > 1
        response = await self._ask(call, headers, limits, patient=patient)
        try:
            await response.aread()
        except httpx.HTTPError as exc:
            raise _nobody(self._servers) from exc
        finally:
            await response.aclose()
        return _decoded(call, response)

    async def every(self, listing: Call[Page[T]]) -> AsyncIterator[T]:
        """As `Client.every`."""
        page = await self.send(listing)
        while True:
            for item in page.items:
                yield item
            if not page.next:
                return
            page = await self.send(endpoints.next_page(listing, page.next))

    async def stream(self, call: Call[T]) -> AsyncIterator[T]:
        """As `Client.stream`."""
        headers = _headers(self._servers, call, self._by, "")
        while True:
            response = await self._ask(call, headers, httpx.Timeout(ANSWER_WITHIN_S, read=None), patient=True)
            try:
                async for line in response.aiter_lines():
                    if not line:
                        return
                    yield _view(call, line)
            except httpx.HTTPError:
                continue
            finally:
                await response.aclose()

    async def _ask(
        self, call: Call[Any], headers: Mapping[str, str], limits: httpx.Timeout, *, patient: bool
    ) -> httpx.Response:
        async for attempt in _until_somebody_leads(limits, patient=patient):
            with attempt:
                route = _Route(self._servers)
                while (url := route.next()) is not None:
                    try:
                        response = await self._http.send(_request(self._http, call, url, headers, limits), stream=True)
                    except httpx.HTTPError as exc:
                        _raise_if_hopeless(exc, url)
                        continue
                    if route.is_answer(url, response):
                        if response.status_code >= 400:
                            await response.aread()
                            await response.aclose()
                            raise _refusal(response)
                        return response
                    await response.aclose()
                raise _nobody(self._servers)
        raise _nobody(self._servers)

    async def close(self) -> None:
        await self._http.aclose()


class _Route:
    """The order in which servers are asked: the configured ones, and the leader that they name. No I/O."""

    def __init__(self, servers: Servers) -> None:
        self._servers = servers
        self._to_ask = list(servers.urls)
        self._asked: set[str] = set()

    def next(self) -> str | None:
        while self._to_ask:
            url = self._to_ask.pop(0)
            if url not in self._asked:
                self._asked.add(url)
                return url
        return None

    def is_answer(self, url: str, response: httpx.Response) -> bool:
        """False if the response only says that another server leads, or that there is no leader now."""
        if response.status_code == 307:
            parts = urlsplit(response.headers.get("Location", ""))
            leader = f"{parts.scheme}://{parts.netloc}{urlsplit(url).path}"
            if self._servers.may_follow(url, leader):
                self._to_ask.insert(0, leader)
            return False
        return not (response.status_code == 503 and "Retry-After" in response.headers)


def _until_somebody_leads(limits: httpx.Timeout, *, patient: bool) -> Any:
    """Attempts with growing pauses. A single server that does not answer is not retried: its address may be wrong.

    One that is frozen takes as long as an answer of one may; all together have the time that was asked for.
    """
    within_s = None if limits.read is None else max(limits.read, limits.pool or 0.0)
    return stamina.retry_context(
        on=NoLeader,
        attempts=None if patient else 1,
        timeout=FAIL_OVER_S if within_s is None else min(FAIL_OVER_S, max(0.1, within_s)),
        wait_initial=0.1,
        wait_max=1.0,
        wait_jitter=0.2,
    )


def _limits(servers: Servers, call: Call[Any], asked_s: float | None) -> httpx.Timeout:
    """How long an answer is waited for; one of several coordinators may be frozen."""
    timeout_s = asked_s or (READ_TIMEOUT_S if call.method == "GET" else TIMEOUT_S)
    begins = timeout_s if len(servers.urls) == 1 else min(timeout_s, ANSWER_WITHIN_S)
    return httpx.Timeout(timeout_s, connect=ANSWER_WITHIN_S, read=begins)


def _request(
    http: httpx.Client | httpx.AsyncClient,
    call: Call[Any],
    url: str,
    headers: Mapping[str, str],
    limits: httpx.Timeout,
) -> httpx.Request:
    return http.build_request(
        call.method, f"{url}{call.path}", content=call.body, headers=dict(headers), timeout=limits
    )


def _headers(servers: Servers, call: Call[Any], by: str, key: str) -> dict[str, str]:
    headers = {"Fedtide-By": by, "Accept-Encoding": "identity", **call.headers}
    if call.starts_something or key:
        headers["Idempotency-Key"] = key or secrets.token_hex(16)
    if servers.token:
        headers["Authorization"] = f"Bearer {servers.token}"
    if call.body is not None:
        headers.setdefault("Content-Type", "application/json")
    return headers


def _read(call: Call[T], response: httpx.Response) -> T:
    try:
        response.read()
    except httpx.HTTPError as exc:
        raise NoLeader(f"{response.url.netloc.decode()} broke off its answer", "Try again") from exc
    finally:
        response.close()
    return _decoded(call, response)


def _decoded(call: Call[T], response: httpx.Response) -> T:
    if endpoints.is_raw(call):
        return cast("T", response.content)
    return _view(call, response.content)


def _view(call: Call[T], data: bytes | str) -> T:
    try:
        return call.answer.validate_json(data, extra="ignore")
    except ValidationError as exc:
        raise ConfigError(SERVER, "what answers there is no fedtide coordinator, or one of another version") from exc


def _refusal(response: httpx.Response) -> FedtideError:
    try:
        found = Problem.model_validate_json(response.content, extra="ignore")
    except ValidationError:
        if (said := _inference_error(response.content)) is not None:
            return ApiError(said, "", 1, response.status_code)
        text = response.content.decode(errors="replace").strip()[:200]
        what = f"{response.url} answers {response.status_code}" + (f": {text}" if text and "<" not in text else "")
        return ApiError(what, f"Is {SERVER} the address of a coordinator?", 1, response.status_code)
    return ApiError(found.detail, found.remedy, found.exit_code, response.status_code)


def _inference_error(body: bytes) -> str | None:
    """What a model's server says is wrong (Open Inference Protocol v2: `{"error": ...}`), or None."""
    try:
        return str(from_json(body)["error"])
    except (ValueError, TypeError, KeyError):
        return None


def _raise_if_hopeless(error: httpx.HTTPError, url: str) -> None:
    """Raises ConfigError for an error that a retry cannot fix."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ssl.SSLCertVerificationError):
            why = f"its certificate is not trusted: {cause.verify_message}"
            raise ConfigError(url, why, f"Set {CA} to its ca.crt") from error
        cause = cause.__cause__ or cause.__context__
    if isinstance(error, httpx.UnsupportedProtocol | httpx.LocalProtocolError):
        raise ConfigError(url, f"cannot be called: {error}") from error


def _tls(servers: Servers) -> ssl.SSLContext | bool:
    if not any(url.startswith("https:") for url in servers.urls):
        return True
    return trusting(servers.ca) if servers.ca is not None else ssl.create_default_context()


def _nobody(servers: Servers) -> NoLeader:
    return NoLeader(
        f"no coordinator answers at {' or '.join(servers.urls)}",
        f"Is it up? `fedtide up -d` starts one here; {SERVER} names one elsewhere",
    )
