"""A nats-server after its disk was full: it refuses writes until it is restarted, also when there is room again.

Seen with nats-server 2.15: one failed write stops a stream for good, and the server's `/healthz` says so.
"""

from __future__ import annotations

import asyncio
import os
import tempfile
from pathlib import Path

import httpx

CHECK_EVERY_S = 2.0
ROOM_BYTES = 16 << 20
"""What must fit before a restart is worth it: a block of a stream and the state of its consumers."""


async def until_writes_are_refused(monitor: str) -> None:
    """Return when a server that was healthy since this call says twice in a row that it cannot write.

    A server that starts, or is away, is left alone: the first takes time with a large store, the second is restarted
    by whoever keeps the process.

    Args:
        monitor: the base URL of its monitoring port.
    """
    was_healthy, refusals = False, 0
    async with httpx.AsyncClient(timeout=CHECK_EVERY_S) as client:
        while refusals < 2:
            await asyncio.sleep(CHECK_EVERY_S)
            try:
                healthy = (await client.get(f"{monitor}/healthz")).is_success
            except httpx.HTTPError:
                was_healthy, refusals = False, 0
                continue
            was_healthy = was_healthy or healthy
            refusals = 0 if healthy or not was_healthy else refusals + 1


async def until_there_is_room(folder: Path) -> None:
    """Return when `ROOM_BYTES` can be written to `folder`."""
    while True:
        if await asyncio.to_thread(_has_room, folder):
            return
        await asyncio.sleep(CHECK_EVERY_S)


def _has_room(folder: Path) -> bool:
    """Tries it: free blocks say nothing of quotas."""
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            os.posix_fallocate(file.fileno(), 0, ROOM_BYTES)
    except OSError:
        return False
    return True
