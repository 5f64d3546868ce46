"""A program that ends when it is asked to: as the first process of a container it would not hear of it by itself."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Coroutine, Iterable
from pathlib import Path
from typing import Any, NoReturn

ALIVE = "FEDTIDE_ALIVE_FILE"
"""Environment variable: a file that is touched while the program's loop turns, for a probe that looks at its age."""
TOUCH_S = 5.0
ENDS = (signal.SIGINT, signal.SIGTERM)


async def until_signalled(work: Coroutine[Any, Any, Any], signals: Iterable[signal.Signals] = ENDS) -> bool:
    """Do `work`, which is cancelled by any of the signals.

    Returns:
        Whether it was.
    """
    task = asyncio.ensure_future(work)
    loop = asyncio.get_running_loop()
    alive = loop.create_task(_touch(Path(os.environ[ALIVE]))) if ALIVE in os.environ else None
    for number in signals:
        loop.add_signal_handler(number, task.cancel)
    try:
        await task
    except asyncio.CancelledError:
        return True
    finally:
        if alive is not None:
            alive.cancel()
    return False


async def _touch(file: Path) -> NoReturn:
    while True:
        file.touch()
        await asyncio.sleep(TOUCH_S)
