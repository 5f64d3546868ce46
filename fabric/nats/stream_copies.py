"""Whole streams as bytes and back: messages with their sequences and times, and consumers with their positions.

JetStream's own snapshots (https://docs.nats.io, "JetStream wire API": STREAM.SNAPSHOT, STREAM.RESTORE). A snapshot is
of one moment, while the stream goes on.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

from fedtide.fabric.errors import BrokerUnavailable, MalformedMessage
from fedtide.fabric.nats.broker import Broker
from fedtide.fabric.nats.jetstream import Received, parse_answer

CHUNK_BYTES = 512 * 1024
ANSWER_WITHIN_S = 60.0


@dataclass(frozen=True, slots=True)
class StreamCopy:
    """Where a stream was when it was copied; `chunks` has to be read to its end."""

    config: dict[str, Any]
    state: dict[str, Any]
    chunks: AsyncIterator[bytes]


async def copy_stream(broker: Broker, stream: str) -> StreamCopy:
    """Begin to copy a stream.

    Raises:
        ApiError: there is no such stream.
        BrokerUnavailable: the server does not answer, or stops in between.
    """
    inbox = broker.new_inbox()
    arrived: asyncio.Queue[Received] = asyncio.Queue()

    async def take(message: Received) -> None:
        arrived.put_nowait(message)

    unsubscribe = await broker.subscribe(inbox, take)
    asked = json.dumps({"deliver_subject": inbox, "chunk_size": CHUNK_BYTES, "jsck": True}).encode()
    answer = parse_answer(await broker.ask(f"$JS.API.STREAM.SNAPSHOT.{stream}", asked, timeout_s=ANSWER_WITHIN_S))

    async def chunks() -> AsyncIterator[bytes]:
        try:
            while True:
                async with asyncio.timeout(ANSWER_WITHIN_S):
                    message = await arrived.get()
                if message.reply:
                    await broker.tell(message.reply, b"")  # so many are on the way at a time
                if not message.data:
                    if (status := message.headers.get("Status", "200")) not in ("200", "204"):
                        raise BrokerUnavailable(f"the copy of stream {stream} broke off: {status}")
                    return
                yield message.data
        except TimeoutError as exc:
            raise BrokerUnavailable(f"the copy of stream {stream} does not go on") from exc
        finally:
            await unsubscribe()

    return StreamCopy(answer["config"], answer["state"], chunks())


async def put_stream(broker: Broker, copy: StreamCopy) -> None:
    """Make a stream as it was when it was copied.

    Raises:
        ApiError: there is a stream of that name, or the server does not take the copy.
        BrokerUnavailable: the server does not answer.
    """
    body = json.dumps({"config": copy.config, "state": copy.state}).encode()
    name = copy.config["name"]
    answer = parse_answer(await broker.ask(f"$JS.API.STREAM.RESTORE.{name}", body, timeout_s=ANSWER_WITHIN_S))
    subject = str(answer["deliver_subject"])
    async for chunk in copy.chunks:
        refused = await broker.ask(subject, chunk, timeout_s=ANSWER_WITHIN_S)
        if refused.startswith(b"-ERR"):
            raise MalformedMessage(f"the server does not take the copy of stream {name}: {refused.decode()[:200]}")
    parse_answer(await broker.ask(subject, b"", timeout_s=10 * ANSWER_WITHIN_S))
