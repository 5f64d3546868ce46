"""Batches requests to one model: requests that wait while the model is busy are run together.

A lane belongs to one loaded release, so a batch never mixes versions. Its queue is bounded.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import dataclass

import numpy as np

from fedtide.edge_agent.serving.sessions import Arrays, InferenceFailed, Model
from fedtide.fabric.errors import TransientError

INLINE_ROWS = 8
INLINE_S = 0.001
"""Shorter runs stay on the event loop: the switch to a thread and back takes a tenth of this."""


class Overloaded(TransientError):
    """The queue of waiting requests is full."""


@dataclass(frozen=True, slots=True)
class BatchLimits:
    """`wait_s`: how long a request may wait for others to join it, though the model is free."""

    batch: int
    queue: int
    wait_s: float


@dataclass(frozen=True, slots=True)
class _Waiting:
    inputs: Arrays
    rows: int
    shape: tuple[object, ...]
    done: asyncio.Future[Arrays]


class Lane:
    """All requests to one loaded release."""

    def __init__(self, model: Model, threads: Executor, limits: BatchLimits) -> None:
        self.model = model
        self._threads = threads
        self._limits = limits
        self._waiting: deque[_Waiting] = deque()
        self._more = asyncio.Event()
        self._runner: asyncio.Task[None] | None = None
        self.largest_batch = 0

    async def infer(self, prepared: Arrays) -> Arrays:
        """The model's outputs for inputs that its `prepare` gave.

        Raises:
            Overloaded: the queue is full.
            InferenceFailed: the model failed on them.
        """
        rows = next(iter(prepared.values())).shape[0] if self.model.batchable and prepared else 1
        quick = 0 < self.model.seconds < INLINE_S and rows <= INLINE_ROWS
        if self._runner is None and self._limits.wait_s == 0 and quick:
            self.largest_batch = max(1, self.largest_batch)
            return self.model.run(prepared)
        if len(self._waiting) >= self._limits.queue:
            raise Overloaded(f"{len(self._waiting)} requests wait for {self.model.name}", "Try again in a moment")
        done: asyncio.Future[Arrays] = asyncio.get_running_loop().create_future()
        shape = tuple((name, array.shape[1:]) for name, array in prepared.items())
        self._waiting.append(_Waiting(prepared, rows, shape, done))
        self._more.set()
        if self._runner is None:
            self._runner = asyncio.create_task(self._run(), name=f"lane-{self.model.name}")
        return await done

    async def _run(self) -> None:
        try:
            while self._waiting:
                await self._until_full()
                batch = self._next_batch()
                self.largest_batch = max(len(batch), self.largest_batch)
                await self._answer(batch)
        finally:
            self._runner = None

    async def _until_full(self) -> None:
        if self._limits.wait_s == 0 or not self.model.batchable:
            return
        deadline = time.monotonic() + self._limits.wait_s
        while len(self._waiting) < self._limits.batch and (left := deadline - time.monotonic()) > 0:
            self._more.clear()
            try:
                async with asyncio.timeout(left):
                    await self._more.wait()
            except TimeoutError:
                return

    def _next_batch(self) -> list[_Waiting]:
        first = self._waiting.popleft()
        batch, rows = [first], first.rows
        while self.model.batchable and self._waiting:
            following = self._waiting[0]
            if following.shape != first.shape or rows + following.rows > self._limits.batch:
                break
            batch.append(self._waiting.popleft())
            rows += following.rows
        return batch

    async def _answer(self, batch: Sequence[_Waiting]) -> None:
        loop = asyncio.get_running_loop()
        inputs = batch[0].inputs if len(batch) == 1 else _joined(batch)
        try:
            results = await loop.run_in_executor(self._threads, self.model.run, inputs)
        except InferenceFailed as exc:
            if len(batch) > 1:
                for each in batch:  # one bad request must not fail the others
                    await self._answer([each])
            elif not batch[0].done.done():
                batch[0].done.set_exception(exc)
            return
        rows = sum(each.rows for each in batch)
        if len(batch) > 1 and any(a.shape[:1] != (rows,) for a in results.values()):
            # The outputs do not have one row per input row, so they cannot be assigned to the requests.
            self.model.batchable = False
            for each in batch:
                await self._answer([each])
            return
        start = 0
        for each in batch:
            whole = len(batch) == 1
            mine = results if whole else {n: a[start : start + each.rows] for n, a in results.items()}
            start += each.rows
            if not each.done.done():
                each.done.set_result(mine)


def _joined(batch: Sequence[_Waiting]) -> Arrays:
    return {name: np.concatenate([each.inputs[name] for each in batch]) for name in batch[0].inputs}
