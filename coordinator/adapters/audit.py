"""The audit trail: a stream of its own in the broker, whose entries are chained by their hashes.

Only the leader writes. An entry is stored before whoever asked gets the answer: what was done and is not in the trail
was not acknowledged.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from typing import Any

from fedtide.fabric.audit_chain import sealed
from fedtide.fabric.encoding import from_json, to_json
from fedtide.fabric.errors import MalformedMessage, StaleWriter
from fedtide.fabric.messages.people import AuditEntry
from fedtide.fabric.nats.broker import Broker
from fedtide.fabric.nats.subjects import AUDIT, Subjects
from fedtide.fabric.process.retry import until_done

log = logging.getLogger(__name__)


class AuditTrail:
    """Appends one entry after the other."""

    def __init__(self, broker: Broker, subjects: Subjects) -> None:
        self._broker = broker
        self._subject = subjects.audit
        self._one_at_a_time = asyncio.Lock()
        self._last: AuditEntry | None = None

    async def append(self, **about: Any) -> None:
        """Store an entry; retried until the broker has it."""
        about["at"] = datetime.now(UTC)
        async with self._one_at_a_time:
            await until_done(log, "audit.waits", lambda: self._append(about))

    async def _append(self, about: dict[str, Any]) -> None:
        while True:
            last = self._last or await self._newest()
            number, before = (last.number + 1, last.hash) if last is not None else (1, "")
            entry = sealed(AuditEntry(number=number, before=before, **about))
            try:
                await self._broker.publish(self._subject, to_json(entry), expected_last=number - 1)
            except StaleWriter:
                self._last = None  # another leader has written, or this one before it lost the answer
                there = await self._newest()
                if there is not None and all(getattr(there, name) == value for name, value in about.items()):
                    return
                continue
            self._last = entry
            return

    async def _newest(self) -> AuditEntry | None:
        found = await self._broker.last(AUDIT, self._subject)
        return from_json(AuditEntry, found.data, "audit entry") if found is not None else None

    async def entries(self, first: int = 1) -> AsyncIterator[AuditEntry]:
        """From a number on, oldest first."""
        while batch := await self._broker.read_from(AUDIT, first):
            for message in batch:
                first = message.sequence + 1
                try:
                    yield from_json(AuditEntry, message.data, "audit entry")
                except MalformedMessage as exc:  # then an entry is missing, and `audit verify` says so
                    log.error("audit.unreadable", extra={"sequence": message.sequence, "reason": str(exc)})
