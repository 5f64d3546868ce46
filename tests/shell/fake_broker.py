"""A nats-server in memory and connections to it: what passes the contract suite with it passes it with the real one.

Streams store what `fedtide.fabric.nats.streams` says they capture. Not modelled: leaves, mirrors and
domains (all streams stand on one server), permissions, time to live, and limits of size.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import count

from fedtide.fabric.errors import BrokerUnavailable, FedtideError, StaleWriter
from fedtide.fabric.nats.broker import INBOX, Answerer, Broker, Handler
from fedtide.fabric.nats.jetstream import Ack, Delivery, Received, StreamState
from fedtide.fabric.nats.streams import Config
from fedtide.fabric.nats.subjects import UP, up_stream

LONG_AGO = datetime.min.replace(tzinfo=UTC)
Ready = Callable[[], Awaitable[None]]


def matches(pattern: str, subject: str) -> bool:
    """Whether a subject falls under a pattern with `*` and `>`."""
    wanted, parts = pattern.split("."), subject.split(".")
    if wanted[-1] == ">":
        return len(parts) >= len(wanted) and matches(".".join(wanted[:-1]), ".".join(parts[: len(wanted) - 1]))
    return len(wanted) == len(parts) and all(w in ("*", p) for w, p in zip(wanted, parts, strict=True))


@dataclass
class Consumer:
    """Sequences that were delivered and acknowledged; a new poller is given again what was not acknowledged."""

    delivered: set[int] = field(default_factory=set)
    done: set[int] = field(default_factory=set)
    poller: int = 0
    pattern: str = ">"


@dataclass
class Stream:
    """Messages by their sequence, oldest first."""

    config: Config
    last: int = 0
    stored: dict[int, Received] = field(default_factory=dict)
    ids: dict[str, int] = field(default_factory=dict)
    consumers: dict[str, Consumer] = field(default_factory=dict)
    arrived: asyncio.Condition = field(default_factory=asyncio.Condition)

    def last_of(self, subject: str) -> int:
        return max((sequence for sequence, m in self.stored.items() if m.subject == subject), default=0)

    def under(self, pattern: str) -> list[Received]:
        return [message for message in self.stored.values() if matches(pattern, message.subject)]


class FakeNats:
    """The server. While `down`, everything that is asked of it is refused as a lost connection is."""

    def __init__(self) -> None:
        self.streams: dict[str, Stream] = {}
        self.subscriptions: dict[int, tuple[str, asyncio.Queue[Received]]] = {}
        self.down = False
        self.lose_confirmations = 0
        """So many messages to come are stored, and nobody learns that they were."""
        self.numbers = count(1)

    def connect(self) -> FakeBroker:
        return FakeBroker(self)

    def stream_of(self, subject: str) -> Stream | None:
        for stream in self.streams.values():
            patterns = stream.config.get("subjects", [])
            assert isinstance(patterns, list)
            # A hub's stream of a region captures what it is sourced from, as if that came at once.
            patterns = [p + suffix for p in patterns for suffix in ("", ".>")]
            if any(matches(pattern, subject) for pattern in patterns):
                return stream
        return None

    def deliver(self, message: Received) -> None:
        for pattern, queue in self.subscriptions.values():
            if matches(pattern, message.subject):
                queue.put_nowait(message)


class FakeBroker(Broker):
    """One connection. Only what would go over the wire is overridden."""

    def __init__(self, server: FakeNats) -> None:
        self._server = server
        self._tasks: set[asyncio.Task[None]] = set()
        self._on_reconnect = []
        self._ended = asyncio.Event()

    async def until_closed(self) -> None:
        await self._ended.wait()

    def _needs_server(self, subject: str) -> None:
        if self._server.down:
            raise BrokerUnavailable(f"no answer on {subject}")

    async def close(self) -> None:
        self._ended.set()
        for task in self._tasks:
            task.cancel()
        for task in list(self._tasks):
            with suppress(asyncio.CancelledError):
                await task

    # -- messages -----------------------------------------------------------------------------------------

    async def ask_with_headers(
        self, subject: str, data: bytes, headers: dict[str, str], *, timeout_s: float = 5.0
    ) -> Received:
        self._needs_server(subject)
        inbox = f"{INBOX}{next(self._server.numbers)}"
        answers: asyncio.Queue[Received] = asyncio.Queue()
        number = next(self._server.numbers)
        self._server.subscriptions[number] = (inbox, answers)
        try:
            self._server.deliver(Received(subject, data, headers, inbox))
            async with asyncio.timeout(timeout_s):
                return await answers.get()
        except TimeoutError as exc:
            raise BrokerUnavailable(f"no answer on {subject}") from exc
        finally:
            del self._server.subscriptions[number]

    async def ask(self, subject: str, data: bytes = b"", *, timeout_s: float = 5.0) -> bytes:
        return (await self.ask_with_headers(subject, data, {}, timeout_s=timeout_s)).data

    async def tell(self, subject: str, data: bytes) -> None:
        self._needs_server(subject)
        self._server.deliver(Received(subject, data))

    async def subscribe(self, subject: str, handler: Handler) -> Ready:
        async def take(message: Received) -> None:
            with suppress(FedtideError):
                await handler(message)

        return self._listen(subject, take)

    async def answer(self, subject: str, handler: Answerer) -> None:
        async def reply(message: Received) -> None:
            if not message.reply.startswith(INBOX):
                return
            with suppress(FedtideError):
                data, headers = await handler(message)
                self._server.deliver(Received(message.reply, data, headers))

        async def take(message: Received) -> None:
            self._start(reply(message))

        self._listen(subject, take)

    def _listen(self, subject: str, take: Handler) -> Ready:
        number, queue = next(self._server.numbers), asyncio.Queue[Received]()
        self._server.subscriptions[number] = (subject, queue)

        async def read() -> None:
            while True:
                await take(await queue.get())

        task = self._start(read())

        async def stop() -> None:
            self._server.subscriptions.pop(number, None)
            task.cancel()

        return stop

    def _start(self, work: Awaitable[None]) -> asyncio.Task[None]:
        task: asyncio.Task[None] = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    # -- streams ------------------------------------------------------------------------------------------

    async def ensure_stream(
        self, config: Mapping[str, object], *, domain: str | None = None, update: bool = True
    ) -> None:
        self._needs_server("$JS.API")
        if domain is not None and config["name"] == UP:
            return  # what it captures comes into the hub's stream of its region at once
        stream = self._server.streams.setdefault(str(config["name"]), Stream(dict(config)))
        if update:
            stream.config = dict(config)

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
        self._needs_server(subject)
        stream = self._server.stream_of(subject)
        if stream is None:
            raise BrokerUnavailable(f"no answer on {subject}")
        if message_id is not None and message_id in stream.ids:
            return Ack(stream.ids[message_id], True)
        if expected_last is not None and expected_last != stream.last:
            raise StaleWriter(f"wrong last sequence: {stream.last}")
        if expected_last_of_subject is not None and expected_last_of_subject != stream.last_of(subject):
            raise StaleWriter(f"wrong last sequence: {stream.last_of(subject)}")
        stream.last += 1
        headers = {
            **(headers or {}),
            "Nats-Sequence": str(stream.last),
            "Nats-Subject": subject,
            "Nats-Time-Stamp": datetime.now(UTC).isoformat(),
        }
        if message_id is not None:
            stream.ids[message_id] = stream.last
        if stream.config.get("max_msgs_per_subject") == 1:
            stream.stored.pop(stream.last_of(subject), None)
        stream.stored[stream.last] = Received(subject, bytes(data), headers)
        sequence = stream.last
        self._server.deliver(Received(subject, bytes(data)))
        async with stream.arrived:
            stream.arrived.notify_all()
        if self._server.lose_confirmations:
            self._server.lose_confirmations -= 1
            raise BrokerUnavailable(f"no answer on {subject}")
        return Ack(sequence, False)

    async def publish_batch(
        self, messages: Sequence[tuple[str, bytes]], *, expected_last: int, timeout_s: float = 10.0
    ) -> int:
        self._needs_server(messages[0][0])
        stream = self._server.stream_of(messages[0][0])
        if stream is None:
            raise BrokerUnavailable(f"no answer on {messages[0][0]}")
        if expected_last != stream.last:
            raise StaleWriter(f"wrong last sequence: {stream.last}")
        lost, self._server.lose_confirmations = self._server.lose_confirmations, 0
        for subject, data in messages:
            await self.publish(subject, data)
        if lost:
            self._server.lose_confirmations = lost - 1
            raise BrokerUnavailable(f"no answer on {messages[-1][0]}")
        return stream.last

    def _stream(self, name: str, domain: str | None = None) -> Stream:
        """What a region's own UP holds is in the hub's stream of that region."""
        self._needs_server(name)
        try:
            return self._server.streams[up_stream(domain) if domain is not None and name == UP else name]
        except KeyError:
            raise BrokerUnavailable(f"stream {name} does not answer") from None

    async def last(
        self, stream: str, subject: str, *, domain: str | None = None, timeout_s: float = 10.0
    ) -> Received | None:
        found = self._stream(stream, domain)
        return found.stored.get(found.last_of(subject))

    async def last_of_each(
        self, stream: str, pattern: str, *, domain: str | None = None, timeout_s: float = 10.0
    ) -> list[Received]:
        return self._stream(stream, domain).under(pattern)

    async def read_from(
        self, stream: str, sequence: int, *, batch: int = 1000, timeout_s: float = 30.0
    ) -> list[Received]:
        return [m for s, m in self._stream(stream).stored.items() if s >= sequence][:batch]

    async def last_under(self, stream: str, pattern: str, *, domain: str | None = None) -> Received | None:
        return max(self._stream(stream, domain).under(pattern), key=lambda m: m.sequence, default=None)

    async def last_sequence(self, stream: str, *, domain: str | None = None) -> int:
        return self._stream(stream, domain).last

    async def messages_by_subject(self, stream: str, pattern: str, *, domain: str | None = None) -> dict[str, int]:
        return dict(Counter(message.subject for message in self._stream(stream, domain).under(pattern)))

    async def stream_names(self) -> list[str]:
        return sorted(self._server.streams)

    async def state_of(self, stream: str, *, domain: str | None = None) -> StreamState:
        found = self._stream(stream, domain)
        limit = found.config.get("max_bytes", -1)
        assert isinstance(limit, int)
        return StreamState(len(found.stored), sum(len(m.data) for m in found.stored.values()), limit, LONG_AGO)

    async def floor(self, stream: str, durable: str) -> int | None:
        consumer = self._stream(stream).consumers.get(durable)
        if consumer is None:
            return None
        waiting = [m.sequence for m in self._stream(stream).under(consumer.pattern) if m.sequence not in consumer.done]
        return min(waiting, default=max(consumer.done, default=0) + 1)

    async def has_stream(self, stream: str, *, domain: str | None = None) -> bool:
        return (up_stream(domain) if domain is not None and stream == UP else stream) in self._server.streams

    async def metadata_of(self, stream: str, *, domain: str | None = None) -> dict[str, str] | None:
        found = self._server.streams.get(stream)
        if found is None:
            return None
        told = found.config.get("metadata", {})
        assert isinstance(told, dict)
        return told

    async def delete_stream(self, stream: str, *, domain: str | None = None) -> None:
        self._needs_server(stream)
        self._server.streams.pop(stream, None)

    async def ensure_consumer(self, stream: str, config: Mapping[str, object]) -> None:
        self._stream(stream).consumers.setdefault(str(config["durable_name"]), Consumer())

    async def purge(self, stream: str, pattern: str, *, domain: str | None = None, up_to: int | None = None) -> int:
        found = self._stream(stream, domain)
        gone = [m.sequence for m in found.under(pattern) if up_to is None or m.sequence <= up_to]
        for sequence in gone:
            del found.stored[sequence]
        return len(gone)

    async def take_over(self, stream: str, durable: str, pattern: str) -> None:
        consumer = self._stream(stream).consumers.setdefault(durable, Consumer())
        consumer.pattern = pattern
        consumer.poller += 1
        consumer.delivered = set(consumer.done)

    async def pull(self, stream: str, durable: str, *, may_ask: Ready | None = None) -> AsyncGenerator[Delivery, None]:
        found = self._stream(stream)
        consumer = found.consumers[durable]
        mine, pattern = consumer.poller, consumer.pattern
        while True:
            if may_ask is not None:
                await may_ask()
            for message in _undelivered(found, pattern, consumer):
                if consumer.poller != mine:
                    return
                consumer.delivered.add(message.sequence)
                yield Delivery(message.subject, message.data, _ack(consumer, message.sequence), message.sequence)
            async with found.arrived:
                if not _undelivered(found, pattern, consumer):
                    await found.arrived.wait()

    async def delete_consumer(self, stream: str, durable: str) -> None:
        self._stream(stream).consumers.pop(durable, None)

    async def backlog(self, stream: str, durable: str) -> tuple[int, int]:
        found = self._stream(stream)
        consumer = found.consumers[durable]
        waiting = _undelivered(found, consumer.pattern, consumer)
        return len(waiting), len(consumer.delivered - consumer.done)


def _undelivered(stream: Stream, pattern: str, consumer: Consumer) -> list[Received]:
    return [message for message in stream.under(pattern) if message.sequence not in consumer.delivered]


def _ack(consumer: Consumer, sequence: int) -> Ready:
    async def ack() -> None:
        consumer.done.add(sequence)

    return ack
