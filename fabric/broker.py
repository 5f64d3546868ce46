"""The one module that speaks NATS: publish, read, consume and watch, with our errors.

It never joins or interprets payloads, and it never gives up a connection: nats-py reconnects
for ever, and calls made meanwhile raise `BrokerUnavailable` when their own time is over.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any

import nats
import nats.errors
from nats.aio.client import Client
from nats.aio.msg import Msg

from fabric.credentials import Access
from fabric.errors import BrokerUnavailable, CredentialsRefused, FedtideError, TooLarge, TransientError
from fabric.jetstream import (
    CONSUMER_NOT_FOUND,
    PULL_BATCH,
    PULL_HEARTBEAT_S,
    Ack,
    ApiError,
    Delivery,
    Received,
    api,
    backlog_request,
    consumer_request,
    parse_answer,
    pull_request,
)
from fabric.stream_calls import StreamCalls

log = logging.getLogger(__name__)

_RECONNECT_WAIT_S: Any = 0.25  # a number of seconds; nats-py's annotation admits whole ones only
_RETRY_S = 0.5
_PAGE = 1000
NO_ACCESS = Access()
_REFUSALS = ("authorization violation", "authentication revoked", "authentication expired")
_REFUSED = "They were revoked, expired, or are another installation's: enrol with a new join token"
_PAGE_BYTES = 32 * 1024 * 1024

Handler = Callable[["Received"], Awaitable[None]]
Answerer = Callable[["Received"], Awaitable[tuple[bytes, dict[str, str]]]]


class Broker(StreamCalls):
    """A connection to one NATS server. Create it with `connect`, end it with `close`."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._on_reconnect: list[Callable[[], Awaitable[None]]] = []
        self._waiting: set[asyncio.Timeout] = set()
        self._closed = asyncio.Event()
        self._refusal = ""
        self._when_refused: Callable[[], object] | None = None
        self._ending: asyncio.Task[None] | None = None

    @classmethod
    async def connect(cls, url: str, name: str, access: Access = NO_ACCESS, *, wait_s: float | None = 30.0) -> Broker:
        """Connect, waiting up to `wait_s` (None: for ever) for the server to be there.

        Raises:
            BrokerUnavailable: no server answered in time.
            CredentialsRefused: one answered, and does not let us in.
            ConfigError: a file of `access` is missing or wrong.
        """
        client = Client()
        broker = cls(client)
        options = access.options()
        try:
            async with asyncio.timeout(wait_s), broker._unless_refused(url):
                await client.connect(
                    url,
                    name=name,
                    connect_timeout=10,
                    reconnect_time_wait=_RECONNECT_WAIT_S,
                    max_reconnect_attempts=-1,
                    ping_interval=10,
                    max_outstanding_pings=2,
                    pending_size=64 * 1024 * 1024,
                    error_cb=broker._on_error,
                    closed_cb=broker._on_closed,
                    reconnected_cb=broker._reconnected,
                    disconnected_cb=broker._disconnected,
                    **options,
                )
        except (TimeoutError, OSError, nats.errors.Error) as exc:
            raise BrokerUnavailable(f"no NATS server answers at {url}", "Is it running? Try `fedtide status`") from exc
        finally:
            if not client.is_connected:
                await client.close()
        return broker

    @asynccontextmanager
    async def _unless_refused(self, url: str) -> AsyncIterator[None]:
        """nats-py asks again for ever, also a server that says no."""
        task = asyncio.current_task()
        assert task is not None
        self._when_refused = task.cancel
        try:
            yield
        except asyncio.CancelledError:
            if not self._refusal or task.uncancel() > 0:
                raise
            raise CredentialsRefused(f"{url} refuses these credentials: {self._refusal}", _REFUSED) from None
        finally:
            self._when_refused = None

    async def until_closed(self) -> None:
        """Returns when this connection has ended for good.

        Raises:
            CredentialsRefused: because the server does not let us in any more.
        """
        await self._closed.wait()
        if self._refusal:
            raise CredentialsRefused(f"the broker refuses these credentials: {self._refusal}", _REFUSED)

    async def _on_closed(self) -> None:
        self._closed.set()

    async def _on_error(self, error: Exception) -> None:
        text = str(error)
        log.warning("broker.error", extra={"reason": f"{type(error).__name__}: {error}"})
        if isinstance(error, nats.errors.AuthorizationError) or any(word in text.lower() for word in _REFUSALS):
            self._refusal = text
            if self._when_refused is not None:
                self._when_refused()
            elif self._ending is None:
                self._ending = asyncio.create_task(self._client.close(), name="refused")

    async def reconnect(self) -> None:
        """Break this connection off and make it anew, with the credentials that are there now."""
        await self._client.force_reconnect()

    def when_reconnected(self, callback: Callable[[], Awaitable[None]]) -> None:
        """Call `callback` after every reconnect (to read what was missed)."""
        self._on_reconnect.append(callback)

    async def _disconnected(self) -> None:
        """Whoever waits for an answer would wait in vain: its time is over now."""
        now = asyncio.get_running_loop().time()
        for limit in self._waiting:
            limit.reschedule(now)

    async def _reconnected(self) -> None:
        for callback in self._on_reconnect:
            try:
                await callback()
            except FedtideError as exc:
                log.warning("broker.catch_up_failed", extra={"reason": str(exc)})

    async def close(self) -> None:
        """Flush what is on the way and disconnect."""
        try:
            await self._client.drain()
        except nats.errors.Error:
            await self._client.close()

    async def ask(self, subject: str, data: bytes = b"", *, timeout_s: float = 5.0) -> bytes:
        """Send a request and return the answer's payload."""
        return (await self._request(subject, data, timeout_s)).data

    async def ask_with_headers(
        self, subject: str, data: bytes, headers: dict[str, str], *, timeout_s: float = 5.0
    ) -> Received:
        """As `ask`, with headers both ways."""
        return _received(await self._request(subject, data, timeout_s, headers or None))

    async def tell(self, subject: str, data: bytes) -> None:
        """Publish without storage or confirmation."""
        try:
            await self._client.publish(subject, data)
        except nats.errors.Error as exc:
            raise BrokerUnavailable(f"cannot publish to {subject}") from exc

    async def publish(
        self,
        subject: str,
        data: bytes | memoryview,
        *,
        message_id: str | None = None,
        expected_last: int | None = None,
        expected_last_of_subject: int | None = None,
        ttl_s: float | None = None,
        timeout_s: float = 10.0,
    ) -> Ack:
        """Store one message in the stream that captures `subject`.

        Raises:
            StaleWriter: `expected_last` is not the stream's last sequence, or the subject's.
            BrokerUnavailable: not confirmed in time (it may be stored: publish again with the same id).
        """
        headers: dict[str, str] = {}
        if message_id is not None:
            headers["Nats-Msg-Id"] = message_id
        if expected_last is not None:
            headers["Nats-Expected-Last-Sequence"] = str(expected_last)
        if expected_last_of_subject is not None:
            headers["Nats-Expected-Last-Subject-Sequence"] = str(expected_last_of_subject)
        if ttl_s is not None:
            headers["Nats-TTL"] = f"{max(1, round(ttl_s))}s"
        payload = data if isinstance(data, bytes) else bytes(data)
        acked = parse_answer((await self._request(subject, payload, timeout_s, headers or None)).data)
        return Ack(int(acked["seq"]), bool(acked.get("duplicate", False)))

    async def subscribe(self, subject: str, handler: Handler) -> Callable[[], Awaitable[None]]:
        """Call `handler` for each message in turn; returns the way to stop."""

        async def deliver(message: Msg) -> None:
            try:
                await handler(_received(message))
            except FedtideError as exc:
                log.warning("broker.message_refused", extra={"subject": message.subject, "reason": str(exc)})

        subscription = await self._client.subscribe(
            subject, cb=deliver, pending_msgs_limit=-1, pending_bytes_limit=256 * 1024 * 1024
        )
        await self._client.flush()
        return subscription.unsubscribe

    async def answer(self, subject: str, handler: Answerer) -> None:
        """Answer requests on `subject`, each in a task of its own, until the connection closes."""
        under_way: set[asyncio.Task[None]] = set()

        async def reply(message: Msg) -> None:
            data, headers = await handler(_received(message))
            try:
                await self._client.publish(message.reply, data, headers=headers or None)
            except nats.errors.Error as exc:
                log.warning("broker.answer_lost", extra={"subject": message.subject, "reason": str(exc)})

        async def take(message: Msg) -> None:
            if message.reply:
                task = asyncio.create_task(reply(message))
                under_way.add(task)
                task.add_done_callback(under_way.discard)

        await self._client.subscribe(subject, cb=take)
        await self._client.flush()

    async def last(
        self, stream: str, subject: str, *, domain: str | None = None, timeout_s: float = 10.0
    ) -> Received | None:
        """The newest stored message of exactly `subject`, or None."""
        message = await self._request(f"{api(domain)}.DIRECT.GET.{stream}.{subject}", b"", timeout_s)
        return None if "Status" in (message.headers or {}) else _received(message)

    async def last_of_each(
        self, stream: str, pattern: str, *, domain: str | None = None, timeout_s: float = 10.0
    ) -> list[Received]:
        """Every message under `pattern` of a stream that keeps one a subject, oldest first."""
        found: list[Received] = []
        page: list[Received] | None = None
        while page is None or page:
            start = found[-1].sequence + 1 if found else 1
            body = {"seq": start, "next_by_subj": pattern, "batch": _PAGE, "max_bytes": _PAGE_BYTES}
            page = await self._batch(stream, body, domain, timeout_s)
            found += page
        return found

    async def backlog_of(self, stream: str, name: str, pattern: str, *, timeout_s: float = 30.0) -> list[Received]:
        """Every message under `pattern` now, oldest first, through a consumer called `name` that lives as long as this.

        What `last_of_each` does, for those whose permissions name subjects: here the pattern stands in the subject.
        """
        arrived: asyncio.Queue[Msg] = asyncio.Queue()
        inbox = self._client.new_inbox()
        await self.delete_consumer(stream, name)  # one that a predecessor left, or that was half read
        made = await self._call(
            f"CONSUMER.CREATE.{stream}.{name}.{pattern}", backlog_request(stream, name, pattern), None
        )
        subscription = await self._client.subscribe(inbox, cb=arrived.put, pending_msgs_limit=-1)
        found: list[Received] = []
        try:
            while len(found) < int(made["num_pending"]):
                ask = json.dumps({"batch": PULL_BATCH, "no_wait": True}).encode()
                await self._client.publish(f"$JS.API.CONSUMER.MSG.NEXT.{stream}.{name}", ask, reply=inbox)
                page = await _page(arrived, timeout_s)
                if not page:
                    break  # some were replaced or expired meanwhile
                found += page
        except (TimeoutError, nats.errors.Error) as exc:
            raise BrokerUnavailable(f"stream {stream} does not answer") from exc
        finally:
            await subscription.unsubscribe()
        await self.delete_consumer(stream, name)
        return found

    async def read_from(
        self, stream: str, sequence: int, *, batch: int = _PAGE, timeout_s: float = 30.0
    ) -> list[Received]:
        """Up to `batch` messages from `sequence` on; empty at the end."""
        body = {"seq": sequence, "batch": batch, "max_bytes": _PAGE_BYTES}
        return await self._batch(stream, body, None, timeout_s)

    async def consume(
        self, stream: str, durable: str, pattern: str, *, may_ask: Callable[[], Awaitable[None]] | None = None
    ) -> AsyncIterator[Delivery]:
        """Every message under `pattern`, at least once, surviving restarts of both sides.

        One long poll is open at a time; the server pushes into it as messages come. What a
        predecessor took and did not acknowledge comes again at once. Before each poll `may_ask` is
        awaited: who was frozen may have been replaced meanwhile, and must take nothing any more.
        """
        arrived: asyncio.Queue[Msg] = asyncio.Queue()
        inbox = self._client.new_inbox()
        subscription = await self._client.subscribe(inbox, cb=arrived.put, pending_msgs_limit=-1)
        taken_over = False
        try:
            while True:
                if not taken_over:
                    taken_over = await self._take_over(stream, durable, pattern)
                    continue
                if may_ask is not None:
                    await may_ask()
                try:
                    await self._client.publish(
                        f"$JS.API.CONSUMER.MSG.NEXT.{stream}.{durable}", pull_request(), reply=inbox
                    )
                except nats.errors.Error as exc:
                    log.warning("broker.poll_waits", extra={"stream": stream, "reason": str(exc)})
                    await asyncio.sleep(_RETRY_S)
                    continue
                async for message in _until_poll_ends(arrived):
                    yield Delivery(message.subject, message.data, message.ack, message.metadata.sequence.stream)
        finally:
            if not self._client.is_closed:
                await subscription.unsubscribe()

    async def _take_over(self, stream: str, durable: str, pattern: str) -> bool:
        """Make the consumer anew where it stood: a predecessor that is frozen, not dead, gets nothing any more."""
        try:
            start = await self._floor(stream, durable)
            await self.delete_consumer(stream, durable)
            body = consumer_request(stream, durable, pattern, start)
            # The pattern stands in the subject: permissions can name it.
            await self._call(f"CONSUMER.CREATE.{stream}.{durable}.{pattern}", body, None)
        except TransientError as exc:
            log.warning("broker.consumer_wait", extra={"stream": stream, "reason": str(exc)})
            await asyncio.sleep(_RETRY_S)
            return False
        return True

    async def _floor(self, stream: str, durable: str) -> int | None:
        """The first sequence that a consumer has not been told is done with; None if there is no consumer."""
        try:
            answer = await self._call(f"CONSUMER.INFO.{stream}.{durable}", b"", None)
        except ApiError as exc:
            if exc.code != CONSUMER_NOT_FOUND:
                raise
            return None
        return int(answer["ack_floor"]["stream_seq"]) + 1

    async def _batch(
        self, stream: str, body: Mapping[str, object], domain: str | None, timeout_s: float
    ) -> list[Received]:
        arrived: asyncio.Queue[Msg] = asyncio.Queue()
        inbox = self._client.new_inbox()
        subscription = await self._client.subscribe(inbox, cb=arrived.put, pending_msgs_limit=-1)
        found: list[Received] = []
        try:
            await self._client.publish(f"{api(domain)}.DIRECT.GET.{stream}", json.dumps(body).encode(), reply=inbox)
            while True:
                async with asyncio.timeout(timeout_s):
                    message = await arrived.get()
                status = (message.headers or {}).get("Status")
                if status in ("204", "404"):
                    return found
                if status is not None:
                    raise BrokerUnavailable(f"stream {stream} answers with status {status}")
                found.append(_received(message))
        except (TimeoutError, nats.errors.Error) as exc:
            raise BrokerUnavailable(f"stream {stream} does not answer") from exc
        finally:
            await subscription.unsubscribe()

    async def _call(self, verb: str, body: bytes, domain: str | None) -> dict[str, Any]:
        return parse_answer((await self._request(f"{api(domain)}.{verb}", body, 10.0)).data)

    async def _request(self, subject: str, data: bytes, timeout_s: float, headers: dict[str, str] | None = None) -> Msg:
        try:
            async with asyncio.timeout(timeout_s) as limit:
                self._waiting.add(limit)
                try:
                    return await self._client.request(subject, data, timeout=timeout_s, headers=headers)
                finally:
                    self._waiting.discard(limit)
        except nats.errors.MaxPayloadError as exc:
            raise TooLarge(f"a message of {len(data)} bytes is over the broker's limit ({subject})") from exc
        except (nats.errors.Error, TimeoutError, OSError) as exc:
            raise BrokerUnavailable(f"no answer on {subject}") from exc


def _received(message: Msg) -> Received:
    headers = dict(message.headers or {})
    # What was read from a stream arrives on an inbox; the header says where it stands.
    return Received(headers.get("Nats-Subject", message.subject), message.data, headers, message.reply or "")


async def _page(arrived: asyncio.Queue[Msg], timeout_s: float) -> list[Received]:
    """The messages of one pull that does not wait."""
    found: list[Received] = []
    while len(found) < PULL_BATCH:
        async with asyncio.timeout(timeout_s):
            message = await arrived.get()
        if (message.headers or {}).get("Status") is not None:
            break
        found.append(_received(message))
    return found


async def _until_poll_ends(arrived: asyncio.Queue[Msg]) -> AsyncIterator[Msg]:
    for _ in range(PULL_BATCH):
        while True:
            try:
                async with asyncio.timeout(3 * PULL_HEARTBEAT_S):
                    message = await arrived.get()
            except TimeoutError:
                return
            status = (message.headers or {}).get("Status")
            if status is None:
                break
            if status == "503":
                await asyncio.sleep(0.25)
            if status != "100":
                return
        yield message
