"""What ServerApps have printed: stored beside a run's checkpoints while it runs, and for a while after its end."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime

from fedtide.fabric.encoding import from_json
from fedtide.fabric.errors import MalformedMessage
from fedtide.fabric.messages.logs import LogLine, LogPage, LogSegment
from fedtide.fabric.nats.broker import Broker
from fedtide.fabric.nats.jetstream import Received
from fedtide.fabric.nats.subjects import CHECKPOINTS, Subjects


class RunLogs:
    """Reads them, and keeps those of a completed run."""

    def __init__(self, broker: Broker, subjects: Subjects) -> None:
        self._broker = broker
        self._subjects = subjects

    async def keep(self, run: str) -> None:
        """Copy them to where they outlive the run's checkpoints; again changes nothing."""
        for message in await self._stored(self._subjects.run_log(run, "*")):
            slot = message.subject.rpartition(".")[2]
            await self._broker.publish(self._subjects.kept_run_log(run, slot), message.data)

    async def page(self, run: str, after: datetime | None) -> LogPage:
        """The lines after a moment, oldest first."""
        stored = [*await self._stored(self._subjects.run_log(run, "*"))]
        stored += await self._stored(self._subjects.kept_run_log(run, "*"))
        found = {line.model_dump_json(): line for line in _lines(stored) if after is None or line.at > after}
        return LogPage.of(sorted(found.values(), key=lambda line: line.at))

    async def _stored(self, pattern: str) -> list[Received]:
        return await self._broker.last_of_each(CHECKPOINTS, pattern)


def _lines(stored: list[Received]) -> Iterator[LogLine]:
    for message in stored:
        try:
            yield from from_json(LogSegment, message.data, "log").lines
        except MalformedMessage:
            continue  # the aggregator's own doing
