"""The connection to NATS: publish, read, consume and watch, with our errors. Only this and `stream_reads` speak NATS.

It never joins or interprets payloads, and it never gives up a connection: nats-py reconnects
for ever, and calls made meanwhile raise `BrokerUnavailable` after their timeout.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import nats
import nats.errors
from nats.aio.client import Client
from nats.aio.msg import Msg

from fedtide.fabric import trace_context
from fedtide.fabric.errors import BrokerUnavailable, CredentialsRefused, FedtideError, MalformedMessage, TooLarge
from fedtide.fabric.nats import accounts
from fedtide.fabric.nats.cancellation import cancellation_kept
from fedtide.fabric.nats.credentials import Access
from fedtide.fabric.nats.jetstream import Ack, Received, api, parse_answer
from fedtide.fabric.nats.stream_reads import StreamReads, received
from fedtide.fabric.nats.tolerant_client import TolerantClient
from fedtide.fabric.nats.urls import check_url, is_tls
from fedtide.fabric.process.retry import TOLD_AGAIN_S

log = logging.getLogger(__name__)

_RECONNECT_WAIT_S: Any = 0.25  # a number of seconds; nats-py's annotation admits whole ones only
NO_ACCESS = Access()
INBOX = "_INBOX."
INBOXES = (INBOX, "_R_.")
"""What an answer may go to; the second stands for an inbox of another account."""
MAX_BATCH = 1000
"""Messages that a server takes as one atomic batch."""
CLOSE_WITHIN_S = 5.0
"""Limit for `close`: draining may wait for ever for a server that is gone."""
_REFUSALS = ("authorization violation", "authentication revoked", "authentication expired")
_REFUSED = "They were revoked, expired, or are another installation's: enrol with a new join token"

Handler = Callable[["Received"], Awaitable[None]]
Answerer = Callable[["Received"], Awaitable[tuple[bytes, dict[str, str]]]]


class Broker(StreamReads):
    """A connection to one NATS server. Create it with `connect`, end it with `close`."""

    has_identity = False
    """Whether it connects with credentials; without, all is one account."""

    def streams_of(self, region: str) -> str:
        """The domain under which a process of a region reads that region's streams (`accounts.streams_of`)."""
        return accounts.streams_of(region, has_identity=self.has_identity)

    def hub_of(self, region: str) -> str:
        """The same, of the hub's streams."""
        return accounts.hub_of(region, has_identity=self.has_identity)

    def __init__(self, client: Client) -> None:
        self._client = client
        self._on_reconnect: list[Callable[[], Awaitable[None]]] = []
        self._waiting: set[asyncio.Timeout] = set()
        self._closed = asyncio.Event()
        self._back = asyncio.Event()
        self._refusal = ""
        self._told = "", 0.0
        """The error that was logged last, and when."""
        self._connecting = True
        self._ending: asyncio.Task[None] | None = None

    @classmethod
    async def connect(cls, url: str, name: str, access: Access = NO_ACCESS, *, wait_s: float | None = 30.0) -> Broker:
        """Connect, waiting up to `wait_s` (None: for ever) for the server to be there.

        Raises:
            BrokerUnavailable: no server answered in time.
            CredentialsRefused: one answered, and does not let us in.
            ConfigError: a file of `access` is missing or wrong, or `url` leads over a network without TLS.
        """
        check_url("nats_url", url)
        client = TolerantClient()
        broker = cls(client)
        broker.has_identity = access.credentials is not None
        options = access.options()
        try:
            async with cancellation_kept(), asyncio.timeout(wait_s):
                await client.connect(
                    url,
                    name=name,
                    connect_timeout=10,
                    reconnect_time_wait=_RECONNECT_WAIT_S,
                    max_reconnect_attempts=-1,
                    ping_interval=10,
                    max_outstanding_pings=2,
                    pending_size=64 * 1024 * 1024,
                    # Before a word is spoken: whoever sits in the path cannot say that none is needed.
                    tls_handshake_first=is_tls(url),
                    error_cb=broker._on_error,
                    closed_cb=broker._on_closed,
                    reconnected_cb=broker._reconnected,
                    disconnected_cb=broker._disconnected,
                    **options,
                )
        except (TimeoutError, OSError, nats.errors.Error) as exc:
            raise BrokerUnavailable(f"no NATS server answers at {url}", "Is it running? Try `fedtide status`") from exc
        finally:
            broker._connecting = False
            if not client.is_connected:
                await client.close()
        return broker

    @property
    def is_connected(self) -> bool:
        """Whether there is a connection just now; a lost one is looked for again."""
        return bool(self._client.is_connected)

    @property
    def traffic(self) -> tuple[int, int]:
        """Bytes of messages received and sent since this connection was made."""
        return self._client.stats["in_bytes"], self._client.stats["out_bytes"]

    async def until_closed(self) -> None:
        """Returns when this connection has ended for good.

        Raises:
            CredentialsRefused: because the server does not let us in any more.
        """
        await self._closed.wait()
        if self._refusal:
            raise self._refused()

    def _refused(self) -> CredentialsRefused:
        return CredentialsRefused(f"the broker refuses these credentials: {self._refusal}", _REFUSED)

    async def _on_closed(self) -> None:
        last = str(self._client.last_error or "")
        if not self._refusal and _is_refusal(last):
            self._refusal = last
        self._closed.set()
        self._back.set()

    async def _on_error(self, error: Exception) -> None:
        reason, now = f"{type(error).__name__}: {error}", time.monotonic()
        if reason != self._told[0] or now >= self._told[1] + TOLD_AGAIN_S:  # a client that reconnects says it often
            log.warning("broker.error", extra={"reason": reason})
            self._told = reason, now
        if isinstance(error, nats.errors.AuthorizationError) or _is_refusal(str(error)):
            self._refusal = str(error)
            if self._connecting:  # nats-py would try again for ever
                raise self._refused()
            if self._ending is None:
                self._ending = asyncio.create_task(self._client.close(), name="refused")

    async def reconnect(self) -> None:
        """Close this connection and connect again, with the credentials that are stored now."""
        self._back.clear()
        await self._client.force_reconnect()
        await self._back.wait()

    def when_reconnected(self, callback: Callable[[], Awaitable[None]]) -> None:
        """Call `callback` after every reconnect (to read what was missed)."""
        self._on_reconnect.append(callback)

    async def _disconnected(self) -> None:
        """End all pending requests: their answers can no longer arrive."""
        now = asyncio.get_running_loop().time()
        for limit in self._waiting:
            if not limit.expired():
                limit.reschedule(now)

    async def _reconnected(self) -> None:
        self._back.set()
        for callback in self._on_reconnect:
            try:
                await callback()
            except FedtideError as exc:
                log.warning("broker.catch_up_failed", extra={"reason": str(exc)})

    async def close(self) -> None:
        """Flush what is on the way and disconnect."""
        try:
            async with cancellation_kept(), asyncio.timeout(CLOSE_WITHIN_S):
                await self._client.drain()
        except (nats.errors.Error, TimeoutError, OSError):
            with suppress(TimeoutError, OSError):
                async with asyncio.timeout(CLOSE_WITHIN_S):
                    await self._client.close()

    def new_inbox(self) -> str:
        """A subject of this connection, which nobody can guess."""
        return self._client.new_inbox()

    async def ask(self, subject: str, data: bytes = b"", *, timeout_s: float = 5.0) -> bytes:
        """Send a request and return the answer's payload."""
        return (await self._request(subject, data, timeout_s)).data

    async def ask_with_headers(
        self, subject: str, data: bytes, headers: dict[str, str], *, timeout_s: float = 5.0
    ) -> Received:
        """As `ask`, with headers both ways."""
        return received(await self._request(subject, data, timeout_s, headers or None))

    async def respond(self, asked: Received, data: bytes) -> None:
        """Answer a request, only to an inbox: the sender may name subjects to which it must not publish itself."""
        if not asked.reply.startswith(INBOXES):
            raise MalformedMessage(f"a request on {asked.subject} wants its answer on {asked.reply!r}, no inbox")
        await self.tell(asked.reply, data)

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
        headers: Mapping[str, str] | None = None,
    ) -> Ack:
        """Store one message in the stream that captures `subject`; `headers` are stored with it.

        Raises:
            StaleWriter: `expected_last` is not the stream's last sequence, or the subject's.
            BrokerUnavailable: not confirmed in time (it may be stored: publish again with the same id).
        """
        headers = dict(headers or {})
        if message_id is not None:
            headers["Nats-Msg-Id"] = message_id
        if expected_last is not None:
            headers["Nats-Expected-Last-Sequence"] = str(expected_last)
        if expected_last_of_subject is not None:
            headers["Nats-Expected-Last-Subject-Sequence"] = str(expected_last_of_subject)
        if ttl_s is not None:
            headers["Nats-TTL"] = f"{max(1, round(ttl_s))}s"
        if (context := trace_context.current()) is not None:
            headers[trace_context.TRACEPARENT] = str(context)
        payload = data if isinstance(data, bytes) else bytes(data)
        acked = parse_answer((await self._request(subject, payload, timeout_s, headers or None)).data)
        return Ack(int(acked["seq"]), bool(acked.get("duplicate", False)))

    async def publish_batch(
        self, messages: Sequence[tuple[str, bytes]], *, expected_last: int, timeout_s: float = 10.0
    ) -> int:
        """Store all messages in one stream, or none (NATS ADR-50, atomic batch publishing).

        Args:
            messages: at most `MAX_BATCH` of subject and data.

        Returns:
            The sequence of the last one.

        Raises:
            StaleWriter: `expected_last` is not the stream's last sequence.
            BrokerUnavailable: not confirmed in time (they may be stored, all of them).
        """
        batch = secrets.token_hex(8)
        *before, (subject, data) = messages
        try:
            for number, (each, body) in enumerate(before, start=1):
                headers = {"Nats-Batch-Id": batch, "Nats-Batch-Sequence": str(number)}
                if number == 1:
                    headers["Nats-Expected-Last-Sequence"] = str(expected_last)
                await self._client.publish(each, body, headers=headers)
        except (nats.errors.Error, OSError) as exc:
            raise BrokerUnavailable(f"cannot publish to {subject}") from exc
        headers = {"Nats-Batch-Id": batch, "Nats-Batch-Sequence": str(len(messages)), "Nats-Batch-Commit": "1"}
        if not before:
            headers["Nats-Expected-Last-Sequence"] = str(expected_last)
        acked = parse_answer((await self._request(subject, data, timeout_s, headers)).data)
        return int(acked["seq"])

    async def subscribe(self, subject: str, handler: Handler) -> Callable[[], Awaitable[None]]:
        """Call `handler` for each message in turn; returns the way to stop."""

        async def deliver(message: Msg) -> None:
            try:
                await handler(received(message))
            except FedtideError as exc:
                log.warning("broker.message_refused", extra={"subject": message.subject, "reason": str(exc)})

        subscription = await self._client.subscribe(
            subject, cb=deliver, pending_msgs_limit=-1, pending_bytes_limit=256 * 1024 * 1024
        )
        async with cancellation_kept():
            await self._client.flush()
        return subscription.unsubscribe

    async def answer(self, subject: str, handler: Answerer) -> None:
        """Answer requests on `subject`, each in a task of its own, until the connection closes."""
        under_way: set[asyncio.Task[None]] = set()

        async def reply(message: Msg) -> None:
            try:
                data, headers = await handler(received(message))
            except FedtideError as exc:
                log.warning("broker.question_refused", extra={"subject": message.subject, "reason": str(exc)})
                return
            try:
                await self._client.publish(message.reply, data, headers=headers or None)
            except nats.errors.Error as exc:
                log.warning("broker.answer_lost", extra={"subject": message.subject, "reason": str(exc)})

        async def take(message: Msg) -> None:
            if message.reply.startswith(INBOXES):
                task = asyncio.create_task(reply(message))
                under_way.add(task)
                task.add_done_callback(under_way.discard)

        await self._client.subscribe(subject, cb=take)
        async with cancellation_kept():
            await self._client.flush()

    async def _call(self, verb: str, body: bytes, domain: str | None) -> dict[str, Any]:
        return parse_answer((await self._request(f"{api(domain)}.{verb}", body, 10.0)).data)

    async def _request(self, subject: str, data: bytes, timeout_s: float, headers: dict[str, str] | None = None) -> Msg:
        try:
            async with cancellation_kept(), asyncio.timeout(timeout_s) as limit:
                self._waiting.add(limit)
                try:
                    return await self._client.request(subject, data, timeout=timeout_s, headers=headers)
                finally:
                    self._waiting.discard(limit)
        except nats.errors.MaxPayloadError as exc:
            raise TooLarge(f"a message of {len(data)} bytes is over the broker's limit ({subject})") from exc
        except (nats.errors.Error, TimeoutError, OSError) as exc:
            raise BrokerUnavailable(f"no answer on {subject}") from exc


def _is_refusal(text: str) -> bool:
    return any(words in text.lower() for words in _REFUSALS)
