"""The thread in which a run's program works; the ServerApp's threads are its guests."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine
from typing import Any, TypeVar

from fedtide.aggregation.config import WorkerConfig
from fedtide.aggregation.link.cohorts import End
from fedtide.aggregation.link.run_link import RunLink
from fedtide.fabric.nats.broker import Broker

T = TypeVar("T")


class GridLink(RunLink):
    """Other threads use it through `call` only."""

    def __init__(self, config: WorkerConfig, end: End) -> None:
        super().__init__(config, end)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="grid-link", daemon=True)

    def open(self) -> None:
        """Connect and start listening for replies.

        Raises:
            BrokerUnavailable: no server answered.
        """
        self._thread.start()
        self.call(self._open())

    async def _open(self) -> None:
        config = self._config
        await self.start(await Broker.connect(config.nats_url, f"aggregator-{config.run}", config.access))

    def close(self) -> None:
        """As `stop`, and end the thread."""
        self.call(self.stop())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout=10)
        if not self._thread.is_alive():
            self._loop.close()

    def call(self, work: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine on the loop from another thread."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()
