"""A limit on bytes a second."""

from __future__ import annotations

import asyncio


class Pace:
    """Spreads bytes over time: `spend` returns once they may pass. Without a limit, at once."""

    def __init__(self, bytes_per_s: int | None) -> None:
        self._bytes_per_s = bytes_per_s
        self._free_at = 0.0

    async def spend(self, size_bytes: int) -> None:
        if self._bytes_per_s is None:
            return
        now = asyncio.get_running_loop().time()
        start = max(now, self._free_at)
        self._free_at = start + size_bytes / self._bytes_per_s
        await asyncio.sleep(start - now)  # the limit itself: time has to pass
