"""A connection of a process that is killed at a point of our choice."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from tests.shell.fake_broker import FakeBroker, FakeNats


class KilledBroker(FakeBroker):
    """A connection of a process that stops at its `kill_at`-th call, before or after the server has done it."""

    def __init__(self, server: FakeNats, kill_at: int, *, before: bool) -> None:
        super().__init__(server)
        self.calls = 0
        self.killed = asyncio.Event()
        self._kill_at, self._before = kill_at, before

    async def _may_die(self, work: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        self.calls += 1
        dies = self.calls == self._kill_at
        if not (dies and self._before):
            result = await work(*arguments, **options)
        if dies or self.killed.is_set():
            self.killed.set()
            await asyncio.Event().wait()
        return result

    async def publish(self, *arguments: Any, **options: Any) -> Any:
        return await self._may_die(super().publish, *arguments, **options)

    async def publish_batch(self, *arguments: Any, **options: Any) -> Any:
        return await self._may_die(super().publish_batch, *arguments, **options)

    async def last(self, *arguments: Any, **options: Any) -> Any:
        return await self._may_die(super().last, *arguments, **options)

    async def read_from(self, *arguments: Any, **options: Any) -> Any:
        return await self._may_die(super().read_from, *arguments, **options)

    async def purge(self, *arguments: Any, **options: Any) -> Any:
        return await self._may_die(super().purge, *arguments, **options)

    async def subjects_of(self, *arguments: Any, **options: Any) -> Any:
        return await self._may_die(super().subjects_of, *arguments, **options)

    async def ask(self, *arguments: Any, **options: Any) -> Any:
        return await self._may_die(super().ask, *arguments, **options)

    async def take_over(self, *arguments: Any, **options: Any) -> Any:
        return await self._may_die(super().take_over, *arguments, **options)

    async def tell(self, *arguments: Any, **options: Any) -> Any:
        return await self._may_die(super().tell, *arguments, **options)
