"""Drift recording on a node: sketches of model inputs and outputs, published in its region every window.

`fedtide.edge_agent.drift.collector` sums those of a region; sketches never leave it.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from fedtide.edge_agent.config import AgentConfig
from fedtide.edge_agent.drift.sketch import Sketch, pack
from fedtide.edge_agent.serving.serving import Served
from fedtide.edge_agent.serving.sessions import Arrays, Model
from fedtide.fabric.errors import TransientError
from fedtide.fabric.nats.broker import Broker
from fedtide.fabric.nats.subjects import Subjects

log = logging.getLogger(__name__)

GATHER = 256
GATHER_BYTES = 1024 * 1024
MAX_PENDING_BATCHES = 8
"""A lot to count is GATHER requests or GATHER_BYTES of inputs; at most MAX_PENDING_BATCHES lots may wait."""


class DriftWatch:
    """Observes the serving; its task is idle while there are no requests."""

    def __init__(self, config: AgentConfig, broker: Broker) -> None:
        self._config = config
        self._broker = broker
        self._subjects = Subjects(config.tenant)
        self._sketches: dict[str, tuple[Model, Sketch]] = {}
        self._pending: dict[str, list[Served]] = {}
        self._pending_bytes = 0
        self._behind = 0
        self._seen = asyncio.Event()
        self._counting = ThreadPoolExecutor(1, thread_name_prefix="drift")
        """The only thread that uses sketches: counting takes milliseconds, and no request waits for it."""

    def observe(self, served: Served) -> None:
        if served.outputs is None:
            return
        waiting = self._pending.setdefault(served.model.name, [])
        if waiting and waiting[0].model is not served.model:
            self._hand_over(served.model.name)
            waiting = self._pending.setdefault(served.model.name, [])
        waiting.append(served)
        self._pending_bytes += sum(a.nbytes for a in served.prepared.values())
        if len(waiting) >= GATHER or self._pending_bytes >= GATHER_BYTES:
            self._hand_over(served.model.name)
        self._seen.set()

    def _hand_over(self, name: str) -> None:
        self._pending_bytes = 0
        waiting = self._pending.pop(name)
        if self._behind < MAX_PENDING_BATCHES:  # else drop the lot: a sample of the requests is enough
            self._behind += 1
            self._counting.submit(self._count, name, waiting)

    def _count(self, name: str, waiting: list[Served]) -> None:
        self._behind -= 1
        model = waiting[0].model
        known = self._sketches.get(name)
        if known is None or known[0].release != model.release:
            known = self._sketches[name] = (model, Sketch())
        for alike in _alike(waiting):
            inputs = _joined([served.prepared for served in alike])
            outputs = _joined([served.outputs or {} for served in alike])
            known[1].add(inputs, outputs, model.manifest.export.scoring)

    async def run(self) -> None:
        """Publish the sketches of each window, for ever; a window without requests is skipped."""
        width = self._config.drift.window_s
        async with asyncio.TaskGroup() as group:
            while True:
                await self._seen.wait()
                window = int(time.time() // width)
                await asyncio.sleep((window + 1) * width - time.time())
                self._seen.clear()
                for name in [*self._pending]:
                    self._hand_over(name)
                done = await asyncio.get_running_loop().run_in_executor(self._counting, self._take)
                for name, (model, sketch) in done.items():
                    group.create_task(self._leave(name, model, sketch, window), name=f"drift-{name}")

    def _take(self) -> dict[str, tuple[Model, Sketch]]:
        done, self._sketches = self._sketches, {}
        return done

    async def _leave(self, name: str, model: Model, sketch: Sketch, window: int) -> None:
        width = self._config.drift.window_s
        subject = self._subjects.drift(self._config.region, self._config.node, name, window)
        try:
            await self._broker.publish(subject, pack(model.release.digest, sketch, width), ttl_s=4 * width)
        except TransientError as exc:
            log.info("drift.window_lost", extra={"model": name, "window": window, "reason": str(exc)})


def _alike(waiting: list[Served]) -> Iterable[list[Served]]:
    """Groups of requests that can be joined along their first axis; the others one by one."""
    if waiting[0].model.batchable:
        groups: dict[tuple[object, ...], list[Served]] = {}
        for served in waiting:
            groups.setdefault(tuple((n, a.shape[1:]) for n, a in served.prepared.items()), []).append(served)
        return groups.values()
    return [[served] for served in waiting]


def _joined(parts: list[Arrays]) -> Arrays:
    return parts[0] if len(parts) == 1 else {n: np.concatenate([part[n] for part in parts]) for n in parts[0]}
