"""The queue of tasks on a node: round-robin over runs. Pure."""

from __future__ import annotations

from collections import OrderedDict, deque

from fedtide.fabric.messages.tasks import Task


class FairQueue:
    """A run that sends many tasks does not make the others wait for all of them."""

    def __init__(self) -> None:
        self._by_run: OrderedDict[str, deque[Task]] = OrderedDict()

    def put(self, task: Task) -> None:
        self._by_run.setdefault(task.run, deque()).append(task)

    def take(self) -> Task | None:
        """The first task of the run whose turn it is, or None."""
        if not self._by_run:
            return None
        run, tasks = self._by_run.popitem(last=False)
        task = tasks.popleft()
        if tasks:
            self._by_run[run] = tasks  # behind all others
        return task

    def __len__(self) -> int:
        return sum(len(tasks) for tasks in self._by_run.values())
