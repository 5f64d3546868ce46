"""Waits for the replies of one phase: until all have arrived, the quorum is reached, or time is up."""

from __future__ import annotations

import queue
import time
from collections.abc import Iterator

from fedtide.aggregation.folding.in_flight import Arrived, Inbox
from fedtide.fabric.plans.round_policy import Cause, TimeIsUp


class Gathering:
    """Yields replies as they arrive. `waiting`: tasks without a reply; `cause`: why the waiting ended."""

    def __init__(
        self,
        inbox: Inbox,
        waiting: set[str],
        *,
        quorum: int | None = None,
        grace: bool = False,
        full: Cause = "quorum",
        limit_s: float | None = None,
    ) -> None:
        """
        Args:
            quorum: number of counted replies that ends the waiting; None: all.
            grace: after the quorum, wait for more replies until the coordinator ends the grace time.
            full: the cause to report when `quorum` is reached.
            limit_s: the app's own timeout, in seconds.
        """
        self._inbox = inbox
        self._quorum = quorum
        self._grace = grace
        self._full = full
        self._until = None if limit_s is None else time.monotonic() + limit_s
        self.waiting = waiting
        self.counted = 0
        self.cause: Cause = "all answered"

    def count(self) -> None:
        """Count the last yielded reply towards the quorum."""
        self.counted += 1

    def rest(self) -> Iterator[Arrived]:
        """Replies that were already folded when the waiting ended."""
        while not self._inbox.empty():
            item = self._inbox.get()
            if isinstance(item, Arrived) and item.folded and item.task in self.waiting:
                self.waiting.discard(item.task)
                yield item

    def __iter__(self) -> Iterator[Arrived]:
        while self.waiting:
            if self._quorum is not None and self.counted >= self._quorum and not self._grace:
                self.cause = self._full
                return
            try:
                item = self._inbox.get(timeout=self._left())
            except queue.Empty:
                self.cause = "deadline"
                return
            if isinstance(item, TimeIsUp):
                self.cause = item.cause
                return
            self.waiting.discard(item.task)
            yield item

    def _left(self) -> float | None:
        return None if self._until is None else max(0.0, self._until - time.monotonic())
