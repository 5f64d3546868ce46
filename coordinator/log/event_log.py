"""The event log in JetStream: one writer, fenced by the sequence it expects to follow."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Sequence

from fedtide.fabric.errors import MalformedMessage, StaleWriter, TransientError
from fedtide.fabric.events.envelope import Event, UnreadableEvent, decode_event
from fedtide.fabric.nats.broker import Broker
from fedtide.fabric.nats.jetstream import Received
from fedtide.fabric.nats.subjects import EVENTS, Subjects
from fedtide.fabric.process.retry import until_done

log = logging.getLogger(__name__)

SOURCE = "coordinator"
_PAGE = 500
_MUST_UNDERSTAND = b'"must_understand"'


class EventLog:
    """Appends behind what it has read: if another process has appended meanwhile, `append` fails."""

    def __init__(self, broker: Broker, subjects: Subjects) -> None:
        self._broker = broker
        self._subjects = subjects
        self._last = 0
        self.waits_for = ""
        """Why an append waits; empty: none does."""

    @property
    def last(self) -> int:
        """The sequence of the newest event that was read or appended here."""
        return self._last

    def start_after(self, sequence: int) -> None:
        """Skip the events up to `sequence`: they are known already."""
        self._last = sequence

    async def newest_first(self, before: int | None = None) -> AsyncIterator[tuple[int, Event]]:
        """Every event so far with its sequence, from the end, or from the one before the sequence `before`."""
        end = await self._broker.last_sequence(EVENTS)
        if before is not None:
            end = min(end, before - 1)
        while end > 0:
            start = max(1, end - _PAGE + 1)
            page = await self._between(start, end)
            for message in reversed(page):
                yield message.sequence, self._decode(message)
            end = start - 1

    async def _between(self, start: int, end: int) -> list[Received]:
        """Messages of these sequences; one answer holds a limited number of bytes."""
        found: list[Received] = []
        while start <= end and (more := await self._broker.read_from(EVENTS, start, batch=end - start + 1)):
            found += [message for message in more if message.sequence <= end]
            start = more[-1].sequence + 1
        return found

    async def replay(self) -> AsyncIterator[Event]:
        """Every event so far, oldest first; afterwards the log is ready for `append`."""
        while batch := await self._broker.read_from(EVENTS, self._last + 1):
            for message in batch:
                self._last = message.sequence
                yield self._decode(message)

    async def append(self, events: Sequence[tuple[Event, bytes]]) -> None:
        """Store events in their order, all or none, however long the broker is away.

        Args:
            events: each with itself as JSON.

        Raises:
            StaleWriter: another coordinator has taken over; this one must stop.
        """
        messages = [(self._subject(event), data) for event, data in events]
        ids = [event.id for event, _ in events]

        async def store() -> None:
            try:
                if len(messages) == 1:
                    last = (await self._broker.publish(*messages[0], expected_last=self._last)).sequence
                else:
                    last = await self._broker.publish_batch(messages, expected_last=self._last)
            except TransientError as exc:
                self.waits_for = str(exc)
                raise
            except StaleWriter:
                if not await self._stored_already(ids):
                    raise
            else:
                self._last = last

        await until_done(log, "log.append_waits", store, event=ids[0], events=len(ids))
        self.waits_for = ""

    def _subject(self, event: Event) -> str:
        kind, _, name = event.data.kind.partition(".")
        return self._subjects.event(kind, name)

    async def _stored_already(self, ids: Sequence[str]) -> bool:
        """Whether this is what an append left whose confirmation was lost, and that is tried again."""
        stored = await self._broker.read_from(EVENTS, self._last + 1, batch=len(ids))
        if [self._decode(message).id for message in stored] != list(ids):
            return False
        self._last = stored[-1].sequence
        return True

    @staticmethod
    def _decode(message: Received) -> Event:
        """An event of the log; whatever else stands there becomes an `UnreadableEvent`.

        Raises:
            MalformedMessage: an event that must be understood, and is not.
        """
        try:
            return decode_event(message.data)
        except MalformedMessage as exc:
            if _MUST_UNDERSTAND in message.data:
                what = f"event {message.sequence} of the log: {exc.what}"
                raise MalformedMessage(what, "A newer fedtide has written it: upgrade") from exc
            data = UnreadableEvent(sequence=message.sequence, reason=exc.what)
            return Event.now(SOURCE, data, id=f"unreadable-{message.sequence}")
