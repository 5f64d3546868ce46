"""Carries out commands: in order for each subject, a bounded number at a time, each again until it is done.

A command that cannot be carried out is parked with its reason, and the next one of its subject goes on. Parked commands
are kept in memory only: a restart issues what the state still needs, and parks it again if it still cannot be done.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from itertools import count

from fedtide.coordinator.commands import (
    CacheRelease,
    Command,
    Commands,
    Fire,
    LaunchAggregator,
    PublishRelease,
    subject_of,
)
from fedtide.fabric.errors import InvalidTransition, NotFound, ReducerFailed, TransientError
from fedtide.fabric.plans.trigger_rule import Notify
from fedtide.fabric.process.retry import Backoff

log = logging.getLogger(__name__)

Handler = Callable[[Command], Awaitable[None]]

AT_ONCE: Mapping[str, int] = {"launch": 8, "publish": 8, "transfer": 2, "notify": 2, "control": 64}
"""How many commands of each kind are carried out at once; transfers in each region, notices in each
channel, so that a slow or absent one holds up no other. A command that waits for its next try holds no place."""
MOST_PARKED = 1_000


@dataclass(frozen=True, slots=True)
class PendingCommand:
    """A command on its way.

    Attributes:
        cause: the id of the event that it follows from.
        reason: why it was parked; empty: it was not.
    """

    id: str
    cause: str
    command: Command
    subject: str
    reason: str = ""
    parked_at: datetime | None = None

    @property
    def name(self) -> str:
        return type(self.command).__name__


class Executor:
    """`start` takes the commands of the engine; the tasks that carry them out belong to `group`."""

    def __init__(self, handle: Handler, group: asyncio.TaskGroup) -> None:
        self._handle = handle
        self._group = group
        self._places: dict[str, asyncio.Semaphore] = {}
        self._queues: dict[str, deque[PendingCommand]] = {}
        self._numbers = count(1)
        self._boot = secrets.token_hex(3)
        """Ids of two processes differ: a retry must not take another command."""
        self.parked: dict[str, PendingCommand] = {}

    def start(self, cause: str, commands: Commands) -> None:
        """Queue commands behind those of the same subject."""
        for command in commands:
            self._put(PendingCommand(f"cmd-{self._boot}-{next(self._numbers)}", cause, command, subject_of(command)))

    def parked_about(self, name: str) -> list[PendingCommand]:
        """What could not be carried out for a run, roll-out, node, model or rule."""
        return [order for order in self.parked.values() if name in order.subject.split("/")]

    def retry(self, id: str) -> PendingCommand:
        """Queue a parked command again. Raises NotFound."""
        order = self.parked.pop(id, None)
        if order is None:
            raise NotFound(f"there is no parked command {id!r}", "See `fedtide events parked`")
        self._put(replace(order, reason="", parked_at=None))
        return order

    def _put(self, order: PendingCommand) -> None:
        queue = self._queues.get(order.subject)
        if queue is not None:
            queue.append(order)
            return
        self._queues[order.subject] = deque([order])
        self._group.create_task(self._work(order.subject), name=f"commands of {order.subject}")

    async def _work(self, subject: str) -> None:
        queue = self._queues[subject]
        try:
            while queue:
                await self._until_done(queue[0])
                queue.popleft()
        finally:
            del self._queues[subject]

    async def _until_done(self, order: PendingCommand) -> None:
        backoff = Backoff()
        place = self._place_of(order.command)
        while True:
            try:
                async with place:
                    await self._handle(order.command)
                return
            except ReducerFailed as exc:  # what it led to is lost on us, not outdated
                self._park(order, exc)
                return
            except InvalidTransition as exc:
                log.warning("command.outdated", extra={"command": order.name, "reason": str(exc)})
                return
            except (TransientError, OSError) as exc:  # a full disk or table of files may have room later
                log.info("command.waits", extra={"command": order.name, "reason": str(exc)})
            except Exception as exc:  # whatever it is: others must go on, and a person must see it
                self._park(order, exc)
                return
            await backoff.wait()

    def _place_of(self, command: Command) -> asyncio.Semaphore:
        match command:
            case LaunchAggregator():
                kind, where = "launch", ""
            case PublishRelease():
                kind, where = "publish", ""
            case CacheRelease(region=region):
                kind, where = "transfer", region
            case Fire(rule=rule) if isinstance(rule.do, Notify):
                kind, where = "notify", rule.do.to
            case _:
                kind, where = "control", ""
        return self._places.setdefault(f"{kind}/{where}", asyncio.Semaphore(AT_ONCE[kind]))

    def _park(self, order: PendingCommand, error: Exception) -> None:
        reason = f"{type(error).__name__}: {error}"
        log.error(
            "command.parked",
            extra={"id": order.id, "command": order.name, "subject": order.subject, "reason": reason},
            exc_info=error,
        )
        while len(self.parked) >= MOST_PARKED:
            del self.parked[next(iter(self.parked))]
        self.parked[order.id] = replace(order, reason=reason, parked_at=datetime.now(UTC))
