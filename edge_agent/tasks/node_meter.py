"""What a node's agent has used, by what it was for. What it starts, it starts for training."""

from __future__ import annotations

from fedtide.fabric.messages.usage import Usage
from fedtide.fabric.process.metering import Meter


class NodeMeter:
    """One for the life of the process: the kernel's accounts begin with it."""

    def __init__(self) -> None:
        self._own, self._started = Meter("self"), Meter("children")
        self._used, self._wasted = Usage(), Usage()
        self._has_task = False

    def task_begins(self) -> None:
        """What the trainer has used since the last task was for none."""
        self._used += self._since()
        self._has_task = True

    def task_ends(self) -> None:
        self._has_task = False

    def of_task(self) -> Usage:
        """What the task has used."""
        return self._since()

    def task_was_cancelled(self) -> None:
        self._wasted += self._since()

    def _since(self) -> Usage:
        return Usage(**self._started.mark()._asdict())

    def totals(self) -> tuple[Usage, Usage]:
        """By the agent itself, and for training that was cancelled, since it started."""
        self._used += Usage(**self._own.mark()._asdict())
        if not self._has_task:
            self._used += self._since()
        return self._used, self._wasted
