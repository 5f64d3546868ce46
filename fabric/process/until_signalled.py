"""A program that ends when it is asked to: as the first process of a container it would not hear of it by itself."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Coroutine, Iterable
from typing import Any

ENDS = (signal.SIGINT, signal.SIGTERM)


async def until_signalled(work: Coroutine[Any, Any, Any], signals: Iterable[signal.Signals] = ENDS) -> bool:
    """Do `work`, which is cancelled by any of the signals.

    Returns:
        Whether it was.
    """
    task = asyncio.ensure_future(work)
    loop = asyncio.get_running_loop()
    for number in signals:
        loop.add_signal_handler(number, task.cancel)
    try:
        await task
    except asyncio.CancelledError:
        return True
    return False
