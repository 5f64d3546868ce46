"""Requests to JetStream's API about streams and consumers (https://docs.nats.io, "JetStream wire API")."""

from __future__ import annotations

import json
import logging
from abc import ABC, abstractmethod
from collections.abc import Mapping
from datetime import datetime
from typing import Any

from fedtide.fabric.nats.jetstream import (
    CONSUMER_NOT_FOUND,
    STREAM_NAME_IN_USE,
    STREAM_NOT_FOUND,
    ApiError,
    StreamState,
)

log = logging.getLogger(__name__)


class StreamCalls(ABC):
    """The part of a broker that needs nothing but requests to the API."""

    @abstractmethod
    async def _call(self, verb: str, body: bytes, domain: str | None) -> dict[str, Any]:
        """The API's answer; raises ApiError if it refuses."""

    async def subjects_of(self, stream: str, pattern: str, *, domain: str | None = None) -> frozenset[str]:
        """The subjects under `pattern` that hold a message."""
        return frozenset(await self.messages_by_subject(stream, pattern, domain=domain))

    async def messages_by_subject(self, stream: str, pattern: str, *, domain: str | None = None) -> dict[str, int]:
        """How many messages each subject under `pattern` holds."""
        found: dict[str, int] = {}
        read = 0
        while True:  # a server answers with so many subjects at a time
            body = json.dumps({"subjects_filter": pattern, "offset": read}).encode()
            answer = await self._call(f"STREAM.INFO.{stream}", body, domain)
            page = answer["state"].get("subjects") or {}
            found |= page
            read += len(page)  # not those that were found: between two pages some may have moved
            if not page or read >= int(answer.get("total", 0)):
                return found

    async def stream_names(self) -> list[str]:
        found: list[str] = []
        while True:
            answer = await self._call("STREAM.NAMES", json.dumps({"offset": len(found)}).encode(), None)
            found += answer["streams"] or []
            if not answer["streams"] or len(found) >= int(answer["total"]):
                return sorted(found)

    async def state_of(self, stream: str, *, domain: str | None = None) -> StreamState:
        answer = await self._call(f"STREAM.INFO.{stream}", b"", domain)
        state = answer["state"]
        return StreamState(
            messages=int(state["messages"]),
            bytes=int(state["bytes"]),
            max_bytes=int(answer["config"].get("max_bytes", -1)),
            created=datetime.fromisoformat(answer["created"]),
        )

    async def floor(self, stream: str, durable: str) -> int | None:
        """The first sequence that a durable consumer has not acknowledged; None if there is no consumer."""
        try:
            answer = await self._call(f"CONSUMER.INFO.{stream}.{durable}", b"", None)
        except ApiError as exc:
            if exc.code != CONSUMER_NOT_FOUND:
                raise
            return None
        return int(answer["ack_floor"]["stream_seq"]) + 1

    async def last_sequence(self, stream: str, *, domain: str | None = None) -> int:
        """The sequence of the newest message of a stream (0 if it never had one)."""
        return int((await self._call(f"STREAM.INFO.{stream}", b"", domain))["state"]["last_seq"])

    async def purge(self, stream: str, pattern: str, *, domain: str | None = None, up_to: int | None = None) -> int:
        """Delete all messages under `pattern`, or those up to a sequence; returns how many."""
        body = json.dumps({"filter": pattern} | ({"seq": up_to + 1} if up_to is not None else {})).encode()
        return int((await self._call(f"STREAM.PURGE.{stream}", body, domain)).get("purged", 0))

    async def ensure_stream(
        self, config: Mapping[str, object], *, domain: str | None = None, update: bool = True
    ) -> None:
        """Create a stream; bring an existing one to `config` (or, without `update`, leave it as it is).

        Raises:
            StoreFull: the server has no room of that size.
        """
        body, name = json.dumps(config).encode(), config["name"]
        if update:
            # First: that it is there, a full server does not say to whoever wants to create it.
            try:
                await self._call(f"STREAM.UPDATE.{name}", body, domain)
                return
            except ApiError as exc:
                if exc.code != STREAM_NOT_FOUND:
                    raise
        elif await self.has_stream(str(name), domain=domain):
            return
        try:
            await self._call(f"STREAM.CREATE.{name}", body, domain)
        except ApiError as exc:
            if exc.code != STREAM_NAME_IN_USE:  # another coordinator was faster
                raise

    async def has_stream(self, stream: str, *, domain: str | None = None) -> bool:
        try:
            await self._call(f"STREAM.INFO.{stream}", b"", domain)
        except ApiError:
            return False
        return True

    async def metadata_of(self, stream: str, *, domain: str | None = None) -> dict[str, str] | None:
        """What a stream's configuration says of it; None if there is no such stream."""
        try:
            answer = await self._call(f"STREAM.INFO.{stream}", b"", domain)
        except ApiError as exc:
            if exc.code != STREAM_NOT_FOUND:
                raise
            return None
        return dict(answer["config"].get("metadata") or {})

    async def delete_stream(self, stream: str, *, domain: str | None = None) -> None:
        """Delete a stream and all that is in it."""
        await self._call(f"STREAM.DELETE.{stream}", b"", domain)

    async def ensure_consumer(self, stream: str, config: Mapping[str, object]) -> None:
        """Create a durable consumer, or bring an existing one to `config`."""
        body = json.dumps({"stream_name": stream, "config": config}).encode()
        await self._call(f"CONSUMER.CREATE.{stream}.{config['durable_name']}", body, None)

    async def delete_consumer(self, stream: str, durable: str) -> None:
        """Forget a durable consumer; it is no error if there is none."""
        try:
            await self._call(f"CONSUMER.DELETE.{stream}.{durable}", b"", None)
        except ApiError as exc:
            log.debug("broker.no_consumer", extra={"durable": durable, "reason": str(exc)})

    async def backlog(self, stream: str, durable: str) -> tuple[int, int]:
        """Messages that a durable consumer has not delivered, and those delivered and not acknowledged."""
        answer = await self._call(f"CONSUMER.INFO.{stream}.{durable}", b"", None)
        return int(answer["num_pending"]), int(answer["num_ack_pending"])
