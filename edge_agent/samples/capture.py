"""Keeps a share of the requests as samples, off the request path, and adds labels that arrive later."""

from __future__ import annotations

import asyncio
import logging
import sqlite3
import time
from collections import deque
from collections.abc import Mapping

from fedtide.edge_agent.config import Capture as CaptureConfig
from fedtide.edge_agent.fleet_clock import FleetClock
from fedtide.edge_agent.samples.store import Sample, SampleStore
from fedtide.edge_agent.serving.scoring import Labels
from fedtide.edge_agent.serving.serving import Served
from fedtide.fabric.ids import new_id

log = logging.getLogger(__name__)

PENDING = 1000
"""Number of samples that may wait to be written; more are dropped: inference never waits for the disk."""
GATHER_S = 0.2


def _can_be_kept(served: Served) -> bool:
    """Whether a request can be a sample: all inputs are numeric and not empty."""
    return all(array.dtype.kind in "biuf" and array.size for array in served.inputs.values())


class Capturer:
    """Observes the serving; its task writes the samples."""

    def __init__(self, config: CaptureConfig, store: SampleStore, clock: FleetClock) -> None:
        self._clock = clock
        self._share = config.share
        self._store = store
        self._pending: deque[Sample] = deque(maxlen=PENDING)
        self._woken = asyncio.Event()
        self._writing = asyncio.Lock()
        self._owed = 0.0

    def observe(self, served: Served) -> None:
        self._owed += self._share
        if self._owed < 1 or served.outputs is None or not _can_be_kept(served):
            return
        self._owed -= 1
        key = served.id or new_id("sample")
        self._pending.append(Sample(served.model.name, key, self._clock.now(), served.inputs))
        self._woken.set()

    async def run(self) -> None:
        """Write captured samples, for ever."""
        while True:
            await self._woken.wait()
            await asyncio.sleep(GATHER_S)  # a batch is one transaction; labels do not wait for it
            await self.flush()

    async def flush(self) -> None:
        async with self._writing:
            self._woken.clear()
            batch = [self._pending.popleft() for _ in range(len(self._pending))]
            if not batch:
                return
            try:
                now, is_sure = self._clock.now(), self._clock.is_told
                await asyncio.to_thread(self._store.add, batch, now, is_sure=is_sure)
            except sqlite3.Error as exc:
                log.error("samples.not_written", extra={"count": len(batch), "reason": str(exc)})

    async def label(self, model: str, labels: Mapping[str, Labels]) -> int:
        """Add labels to captured samples; returns how many of the samples were found."""
        await self.flush()
        return await asyncio.to_thread(self._store.label, model, labels, time.time())
