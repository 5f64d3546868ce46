"""Reports that could not be applied, kept for a person to look at: the dead-letter stream PARKED."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import logging
from collections import Counter
from datetime import UTC, datetime

from fedtide.fabric.encoding import from_json, to_json
from fedtide.fabric.errors import MalformedMessage, NotFound
from fedtide.fabric.messages.views import ParkedView
from fedtide.fabric.nats.broker import Broker
from fedtide.fabric.nats.jetstream import Received
from fedtide.fabric.nats.subjects import PARKED, Subjects
from fedtide.fabric.process.retry import until_done
from fedtide.fabric.strict import Message

log = logging.getLogger(__name__)

KEPT_BYTES = 256 * 1024
"""Of a larger report only the beginning is kept; it cannot be tried again."""
REASON_LENGTH = 2_000
MOST_OF_SENDER, FORGET_AFTER_S = 500, 3600.0
LOOK_AFTER = 1_000
"""So many more are counted here before the stream is asked how many it still has."""


class Parked(Message):
    """A report as it came, and why it was not applied."""

    subject: str
    reason: str
    at: datetime
    data: str
    """Base64."""
    whole: bool = True

    @property
    def raw(self) -> bytes:
        return base64.b64decode(self.data)


class ParkedReports:
    """The stream PARKED. A report is in it once, however often it came."""

    def __init__(self, broker: Broker, subjects: Subjects) -> None:
        self._broker = broker
        self._subjects = subjects
        self._known: set[str] = set()
        self._look_at = LOOK_AFTER
        self._of_sender: Counter[str] = Counter()
        self._counts_since = -FORGET_AFTER_S
        self.dropped = 0
        """Reports of senders that had too many parked."""

    @property
    def count(self) -> int:
        """How many there are, as far as this process knows."""
        return len(self._known)

    async def load(self) -> None:
        """Learn which there are."""
        found = await self._broker.subjects_of(PARKED, self._subjects.all_parked)
        self._known = {subject.rpartition(".")[2] for subject in found}

    async def park(self, subject: str, data: bytes, reason: str) -> None:
        """Keep a report, however long the broker is away; of one sender so many, that nobody crowds out others."""
        if not self._has_room_for(subject.partition(".rpt.")[0]):
            return
        key = hashlib.sha256(subject.encode() + b"\0" + data).hexdigest()[:16]
        kept = base64.b64encode(data[:KEPT_BYTES]).decode()
        parked = Parked(
            subject=subject[:REASON_LENGTH],
            reason=reason[:REASON_LENGTH],
            at=datetime.now(UTC),
            data=kept,
            whole=len(data) <= KEPT_BYTES,
        )
        log.warning("report.parked", extra={"id": key, "subject": parked.subject, "reason": parked.reason})
        await until_done(
            log, "report.parking_waits", lambda: self._broker.publish(self._subjects.parked(key), to_json(parked))
        )
        self._known.add(key)
        if len(self._known) >= self._look_at:  # the stream keeps the newest only
            await until_done(log, "parked.waits", self.load)
            self._look_at = 2 * len(self._known) + LOOK_AFTER

    def _has_room_for(self, sender: str) -> bool:
        now = asyncio.get_running_loop().time()
        if now - self._counts_since >= FORGET_AFTER_S:
            self._of_sender.clear()
            self._counts_since = now
        self._of_sender[sender] += 1
        over = self._of_sender[sender] - MOST_OF_SENDER
        if over > 0:
            self.dropped += 1
            if over == 1:
                log.error("report.dropped", extra={"sender": sender, "reason": f"{MOST_OF_SENDER} of it are parked"})
        return over <= 0

    async def all(self) -> list[ParkedView]:
        """Newest last."""
        found = await self._broker.last_of_each(PARKED, self._subjects.all_parked)
        self._known = {message.subject.rpartition(".")[2] for message in found}
        return [_view(message) for message in found]

    async def get(self, id: str) -> Parked:
        """Raises NotFound."""
        found = await self._broker.last(PARKED, self._subjects.parked(id)) if id.isalnum() else None
        if found is None:
            raise NotFound(f"there is no parked report {id!r}", "See `fedtide events parked`")
        return from_json(Parked, found.data, found.subject)

    async def drop(self, id: str) -> None:
        await self._broker.purge(PARKED, self._subjects.parked(id))
        self._known.discard(id)


def _view(message: Received) -> ParkedView:
    key = message.subject.rpartition(".")[2]
    try:
        parked = from_json(Parked, message.data, message.subject)
    except MalformedMessage as exc:
        at = datetime.fromtimestamp(0, UTC)
        return ParkedView(id=key, kind="report", at=at, subject="", reason=f"cannot be read any more: {exc}")
    beginning = parked.raw[:200].decode("utf-8", "replace")
    return ParkedView(id=key, kind="report", at=parked.at, subject=parked.subject, reason=parked.reason, what=beginning)
