"""The thread in which a run's program works; the ServerApp's threads are its guests."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from fedtide.aggregation.config import WorkerConfig
from fedtide.aggregation.link.mandates import End
from fedtide.aggregation.link.run_link import RunLink
from fedtide.fabric.messages.logs import LogLine
from fedtide.fabric.messages.usage import Usage
from fedtide.fabric.nats.broker import Broker
from fedtide.fabric.process.metering import Meter

T = TypeVar("T")
LOG_PAUSE_S = 0.5
LOG_LINES = 200


class GridLink(RunLink):
    """Other threads use it through `call` only."""

    def __init__(self, config: WorkerConfig, end: End) -> None:
        super().__init__(config, end)
        self._loop = asyncio.new_event_loop()
        self._unstored: list[LogLine] = []
        self._meter, self._traffic = Meter("both"), (0, 0)
        self._thread = threading.Thread(target=self._loop.run_forever, name="grid-link", daemon=True)

    def open(self, meanwhile: Callable[[], None] = lambda: None) -> None:
        """Connect and start listening for replies.

        Args:
            meanwhile: done while servers answer.

        Raises:
            BrokerUnavailable: no server answered.
        """
        self._thread.start()
        opening = asyncio.run_coroutine_threadsafe(self._open(), self._loop)
        meanwhile()
        opening.result()

    async def _open(self) -> None:
        config = self._config
        await self.start(await Broker.connect(config.nats_url, f"aggregator-{config.run}", config.access))

    def close(self) -> None:
        """As `stop`, and end the thread."""
        self.call(self.store_lines())
        self.call(self.stop())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout=10)
        if not self._thread.is_alive():
            self._loop.close()

    def log_lines(self, lines: list[LogLine]) -> None:
        """Store lines soon; what comes within LOG_PAUSE_S goes together."""
        self._loop.call_soon_threadsafe(self._log_later, lines)

    def _log_later(self, lines: list[LogLine]) -> None:
        if not self._unstored:
            self._loop.call_later(LOG_PAUSE_S, self._store_soon)
        self._unstored += lines

    def _store_soon(self) -> None:
        self._storing = self._loop.create_task(self.store_lines())

    async def store_lines(self) -> None:
        """Store what waits."""
        lines, self._unstored = self._unstored, []
        for first in range(0, len(lines), LOG_LINES):
            await self.store_log(lines[first : first + LOG_LINES])

    def used(self) -> Usage:
        """What this process has used since this was asked last."""
        traffic = self._broker.traffic
        before, self._traffic = self._traffic, traffic
        received, sent = (max(now - last, 0) for now, last in zip(traffic, before, strict=True))
        return Usage(**self._meter.mark()._asdict(), received_bytes=received, sent_bytes=sent)

    def used_in_regions(self) -> dict[str, Usage]:
        """What regional aggregators have used for this run since this was asked last."""
        return self.ingest.regions.take_used()

    def call(self, work: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine on the loop from another thread."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()
