"""Cancellation that reaches its task, even if a library swallows it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


@asynccontextmanager
async def cancellation_kept() -> AsyncIterator[None]:
    """Raises a cancellation that was swallowed inside.

    `asyncio.wait_for` of Python 3.11 (nats-py waits with it) returns its result when the answer and the
    cancellation come in the same turn of the loop (cpython issue 86296): the canceller would wait for ever.

    Raises:
        asyncio.CancelledError: the task was cancelled meanwhile.
    """
    task = asyncio.current_task()
    before = task.cancelling() if task is not None else 0
    try:
        yield
    finally:
        if task is not None and task.cancelling() > before:
            raise asyncio.CancelledError
