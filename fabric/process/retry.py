"""Retries: one way for everything, with growing pauses, jitter and a cap (stamina)."""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

import stamina
from stamina.instrumentation import set_on_retry_hooks

from fedtide.fabric.errors import TransientError

T = TypeVar("T")

FIRST_S, CAP_S, JITTER_S = 0.1, 5.0, 0.4
"""Pauses begin with the first, double up to the cap, and vary so that a fleet does not come at once."""

TOLD_AGAIN_S = 600.0
"""A wait that goes on for the same reason is logged again after this."""

set_on_retry_hooks([])  # each wait is logged here, under its own name


async def until_done(
    log: logging.Logger,
    event: str,
    work: Callable[[], Awaitable[T]],
    /,
    *,
    on: type[Exception] | tuple[type[Exception], ...] = TransientError,
    give_up_after_s: float | None = None,
    **fields: object,
) -> T:
    """Call `work` until it succeeds, and return its result; errors other than `on` are raised.

    Args:
        event: the log line of the first wait, of one for another reason, and of one now and then; with `fields` and
            the reason.
        on: errors after which waiting helps.
        give_up_after_s: then the last error is raised; None: never.
    """

    told, told_at = "", 0.0

    def may_work_later(error: Exception) -> bool:
        nonlocal told, told_at
        if not isinstance(error, on):
            return False
        reason, now = str(error), time.monotonic()
        if reason != told or now >= told_at + TOLD_AGAIN_S:
            log.info(event, extra={**fields, "reason": reason})
            told, told_at = reason, now
        return True

    async for attempt in stamina.retry_context(
        on=may_work_later,
        attempts=None,
        timeout=give_up_after_s,
        wait_initial=FIRST_S,
        wait_max=CAP_S,
        wait_jitter=JITTER_S,
    ):
        with attempt:
            return await work()
    raise AssertionError("the last attempt returns or raises")


class Backoff:
    """The same pauses for a loop that never ends: `wait` after a failure, `reset` after what went well."""

    def __init__(self, cap_s: float = CAP_S) -> None:
        self._cap_s = cap_s
        self._failures = 0

    async def wait(self) -> None:
        pause = min(self._cap_s, FIRST_S * 2 ** min(self._failures, 20))
        self._failures += 1
        await asyncio.sleep(pause + random.uniform(0, JITTER_S))  # noqa: S311  # no secret

    def reset(self) -> None:
        self._failures = 0
