"""Requests to JetStream's API about streams and consumers (https://docs.nats.io, "JetStream wire API")."""

from __future__ import annotations

import json
import logging
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

from fedtide.fabric.nats.jetstream import STREAM_NAME_IN_USE, ApiError

log = logging.getLogger(__name__)


class StreamCalls(ABC):
    """The part of a broker that needs nothing but requests to the API."""

    @abstractmethod
    async def _call(self, verb: str, body: bytes, domain: str | None) -> dict[str, Any]:
        """The API's answer; raises ApiError if it refuses."""

    async def subjects_of(self, stream: str, pattern: str, *, domain: str | None = None) -> frozenset[str]:
        """The subjects under `pattern` that hold a message."""
        body = json.dumps({"subjects_filter": pattern}).encode()
        answer = await self._call(f"STREAM.INFO.{stream}", body, domain)
        return frozenset((answer["state"].get("subjects") or {}).keys())

    async def last_sequence(self, stream: str) -> int:
        """The sequence of the newest message of a stream (0 if it never had one)."""
        return int((await self._call(f"STREAM.INFO.{stream}", b"", None))["state"]["last_seq"])

    async def purge(self, stream: str, pattern: str, *, domain: str | None = None) -> int:
        """Delete all messages under `pattern`; returns how many."""
        body = json.dumps({"filter": pattern}).encode()
        return int((await self._call(f"STREAM.PURGE.{stream}", body, domain)).get("purged", 0))

    async def ensure_stream(
        self, config: Mapping[str, object], *, domain: str | None = None, update: bool = True
    ) -> None:
        """Create a stream; bring an existing one to `config` (or, without `update`, leave it as it is)."""
        body = json.dumps(config).encode()
        try:
            await self._call(f"STREAM.CREATE.{config['name']}", body, domain)
        except ApiError as exc:
            if exc.code != STREAM_NAME_IN_USE:
                raise
            if update:
                await self._call(f"STREAM.UPDATE.{config['name']}", body, domain)

    async def has_stream(self, stream: str, *, domain: str | None = None) -> bool:
        try:
            await self._call(f"STREAM.INFO.{stream}", b"", domain)
        except ApiError:
            return False
        return True

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
