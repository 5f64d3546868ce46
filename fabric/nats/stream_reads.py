"""Reading streams: the newest message of a subject, all from a sequence on, or messages as they come."""

from __future__ import annotations

import asyncio
import json
import logging
from abc import abstractmethod
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping

import nats.errors
from nats.aio.client import Client
from nats.aio.msg import Msg

from fedtide.fabric.errors import BrokerUnavailable, NotFound
from fedtide.fabric.nats.jetstream import (
    PULL_BATCH,
    PULL_HEARTBEAT_S,
    Delivery,
    Received,
    api,
    consumer_request,
    pull_request,
)
from fedtide.fabric.nats.stream_calls import StreamCalls
from fedtide.fabric.process.retry import Backoff, until_done

log = logging.getLogger(__name__)

ACKNOWLEDGE = "$JS.ACK."
"""Begins the reply subject of what a consumer delivers, and of nothing else that comes to its inbox."""
REFUSED_PAUSE_S, UNKNOWN_FOR_S = 0.25, 60.0
"""A server that starts knows its consumers after a while; one that it does not know for so long is gone."""
_PAGE = 1000
_PAGE_BYTES = 32 * 1024 * 1024


class StreamReads(StreamCalls):
    """The part of a broker that reads; it needs the client for inboxes."""

    _client: Client

    @abstractmethod
    async def _request(self, subject: str, data: bytes, timeout_s: float, headers: dict[str, str] | None = None) -> Msg:
        """One answer; raises BrokerUnavailable."""

    async def last(
        self, stream: str, subject: str, *, domain: str | None = None, timeout_s: float = 10.0
    ) -> Received | None:
        """The newest stored message of exactly `subject`, or None."""
        message = await self._request(f"{api(domain)}.DIRECT.GET.{stream}.{subject}", b"", timeout_s)
        return None if _status(message) is not None else received(message)

    async def last_under(self, stream: str, pattern: str, *, domain: str | None = None) -> Received | None:
        """The newest stored message of any subject under `pattern`, or None."""
        body = json.dumps({"last_by_subj": pattern}).encode()
        message = await self._request(f"{api(domain)}.DIRECT.GET.{stream}", body, 10.0)
        return None if _status(message) is not None else received(message)

    async def last_of_each(
        self, stream: str, pattern: str, *, domain: str | None = None, timeout_s: float = 10.0
    ) -> list[Received]:
        """Every message under `pattern` of a stream that keeps one message per subject, oldest first."""
        found: list[Received] = []
        page: list[Received] | None = None
        while page is None or page:
            start = found[-1].sequence + 1 if found else 1
            body = {"seq": start, "next_by_subj": pattern, "batch": _PAGE, "max_bytes": _PAGE_BYTES}
            page = await self._batch(stream, body, domain, timeout_s)
            found += page
        return found

    async def read_from(
        self, stream: str, sequence: int, *, batch: int = _PAGE, timeout_s: float = 30.0
    ) -> list[Received]:
        """Up to `batch` messages from `sequence` on; empty at the end."""
        body = {"seq": sequence, "batch": batch, "max_bytes": _PAGE_BYTES}
        return await self._batch(stream, body, None, timeout_s)

    async def consume(
        self, stream: str, durable: str, pattern: str, *, may_ask: Callable[[], Awaitable[None]] | None = None
    ) -> AsyncGenerator[Delivery, None]:
        """As `pull`, through a consumer of every message under `pattern` that is taken over first."""

        async def take_over() -> None:
            await self.take_over(stream, durable, pattern)

        while True:
            await until_done(log, "broker.consumer_waits", take_over, stream=stream)
            try:
                async for delivery in self.pull(stream, durable, may_ask=may_ask):
                    yield delivery
            except NotFound as exc:
                log.warning("broker.consumer_lost", extra={"stream": stream, "reason": str(exc)})

    async def pull(
        self, stream: str, durable: str, *, may_ask: Callable[[], Awaitable[None]] | None = None
    ) -> AsyncGenerator[Delivery, None]:
        """Every message of a durable consumer, at least once, surviving restarts of both sides.

        One long poll is open at a time; the server pushes into it as messages come. Before each poll `may_ask` is
        awaited: a process that was frozen may have been replaced, and must take no more messages.

        Raises:
            NotFound: for a minute nobody has known of the consumer.
        """
        arrived: asyncio.Queue[Msg] = asyncio.Queue()
        unknown = 0
        inbox = self._client.new_inbox()
        subscription = await self._client.subscribe(inbox, cb=arrived.put, pending_msgs_limit=-1)
        backoff = Backoff()
        try:
            while True:
                if may_ask is not None:
                    await may_ask()
                try:
                    await self._client.publish(
                        f"$JS.API.CONSUMER.MSG.NEXT.{stream}.{durable}", pull_request(), reply=inbox
                    )
                except nats.errors.Error as exc:
                    log.warning("broker.poll_waits", extra={"stream": stream, "reason": str(exc)})
                    await backoff.wait()
                    continue
                backoff.reset()
                try:
                    async for message in _until_poll_ends(arrived):
                        yield Delivery(message.subject, message.data, message.ack, message.metadata.sequence.stream)
                    unknown = 0
                except _NobodyAnswers:
                    unknown += 1
                    if unknown * REFUSED_PAUSE_S >= UNKNOWN_FOR_S:
                        raise NotFound(f"consumer {durable} of stream {stream} is gone") from None
                    await asyncio.sleep(REFUSED_PAUSE_S)
        finally:
            if not self._client.is_closed:
                await subscription.unsubscribe()

    async def take_over(self, stream: str, durable: str, pattern: str) -> None:
        """Make a durable consumer anew, at its position, or at the beginning if there was none.

        What a predecessor took and did not acknowledge comes again at once, and one that is frozen, not dead, gets no
        more messages. Meanwhile a second consumer, which nobody reads, keeps the position: this process may die.
        """
        keeper = f"{durable}-floor"
        floor = await self.floor(stream, durable)
        if floor is not None:
            await self.delete_consumer(stream, keeper)  # what an earlier take-over has left is older
            await self._create(stream, keeper, pattern, floor)
            await self.delete_consumer(stream, durable)
        else:
            floor = await self.floor(stream, keeper)
        await self._create(stream, durable, pattern, floor)
        await self.delete_consumer(stream, keeper)

    async def _create(self, stream: str, durable: str, pattern: str, start: int | None) -> None:
        body = consumer_request(stream, durable, pattern, start)
        await self._call(f"CONSUMER.CREATE.{stream}.{durable}.{pattern}", body, None)

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
                status = _status(message)
                if status in ("204", "404"):
                    return found
                if status is not None:
                    raise BrokerUnavailable(f"stream {stream} answers with status {status}")
                found.append(received(message))
        except (TimeoutError, nats.errors.Error) as exc:
            raise BrokerUnavailable(f"stream {stream} does not answer") from exc
        finally:
            await subscription.unsubscribe()


def _status(message: Msg) -> str | None:
    """What a server says instead of a stored message. Senders may write that header too; a sequence, only it adds."""
    headers = message.headers or {}
    return None if "Nats-Sequence" in headers else headers.get("Status")


def received(message: Msg) -> Received:
    headers = dict(message.headers or {})
    # A message that was read from a stream arrives on an inbox; a header has its own subject.
    return Received(headers.get("Nats-Subject", message.subject), message.data, headers, message.reply or "")


class _NobodyAnswers(Exception):
    """The server knows no such consumer: it starts, or the consumer is gone."""


async def _until_poll_ends(arrived: asyncio.Queue[Msg]) -> AsyncIterator[Msg]:
    for _ in range(PULL_BATCH):
        while True:
            try:
                async with asyncio.timeout(3 * PULL_HEARTBEAT_S):
                    message = await arrived.get()
            except TimeoutError:
                return
            status = (message.headers or {}).get("Status")
            if status is None or message.reply.startswith(ACKNOWLEDGE):  # a sender may write that header too
                break
            if status == "503":
                raise _NobodyAnswers
            if status != "100":
                return
        yield message
