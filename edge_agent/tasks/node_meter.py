"""What a node's agent has used, by what it was for.

What it starts, it starts for training; what it receives and sends while it has a task is for that.
"""

from __future__ import annotations

from collections.abc import Callable

from fedtide.fabric.messages.usage import Usage
from fedtide.fabric.process.metering import Meter


class NodeMeter:
    """One for the life of the process: the kernel's accounts begin with it."""

    def __init__(self, traffic: Callable[[], tuple[int, int]]) -> None:
        """`traffic`: bytes received and sent since the process is connected."""
        self._own, self._started = Meter("self"), Meter("children")
        self._traffic, self._moved = traffic, (0, 0)
        self._used, self._wasted = Usage(), Usage()
        self._has_task, self._before = False, Usage()

    def task_begins(self, before: Usage = Usage()) -> None:  # noqa: B008  # it cannot change
        """What was used since the last task was for none. `before`: what this one took under an agent before."""
        self._used += self._since()
        self._has_task, self._before = True, before

    def task_ends(self) -> None:
        self._has_task = False

    def of_task(self) -> Usage:
        """What the task has used."""
        used, self._before = self._before + self._since(), Usage()
        return used

    def task_was_cancelled(self) -> None:
        self._wasted += self.of_task()

    def _since(self) -> Usage:
        traffic = self._traffic()
        received, sent = (max(now - before, 0) for now, before in zip(traffic, self._moved, strict=True))
        self._moved = traffic
        return Usage(**self._started.mark()._asdict(), received_bytes=received, sent_bytes=sent)

    def totals(self) -> tuple[Usage, Usage]:
        """By the agent itself, and for training that was cancelled, since it started."""
        self._used += Usage(**self._own.mark()._asdict())
        if not self._has_task:
            self._used += self._since()
        return self._used, self._wasted
