"""Alarms: due times that the state wants, kept by the clock of this process.

They survive a restart because the state does: its `pending_commands` set them again. An alarm that the state
no longer wants does not ring.
"""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime

from fedtide.coordinator.commands import SetAlarm
from fedtide.coordinator.log.engine import Engine
from fedtide.fabric.errors import InvalidTransition
from fedtide.fabric.events.envelope import AlarmRang


class Alarms:
    """The timers of one coordinator. Setting an alarm cancels those of its owner that are no longer wanted."""

    def __init__(self, engine: Engine, group: asyncio.TaskGroup) -> None:
        self._engine = engine
        self._group = group
        self._timers: dict[tuple[str, str], dict[str, asyncio.TimerHandle]] = {}

    def set(self, alarm: SetAlarm) -> None:
        timers = self._timers.setdefault((alarm.owner, alarm.id), {})
        for key in [
            k for k in timers if k == alarm.key or not self._engine.world.wants_alarm(alarm.owner, alarm.id, k)
        ]:
            timers.pop(key).cancel()
        seconds = max(0.0, (alarm.due - datetime.now(UTC)).total_seconds())
        timers[alarm.key] = asyncio.get_running_loop().call_later(seconds, self._ring, alarm)

    def forget(self, owner: str, id: str) -> None:
        """Cancel all alarms of an owner that has ended."""
        for timer in self._timers.pop((owner, id), {}).values():
            timer.cancel()

    def _ring(self, alarm: SetAlarm) -> None:
        timers = self._timers.get((alarm.owner, alarm.id), {})
        timers.pop(alarm.key, None)
        if not timers:
            self.forget(alarm.owner, alarm.id)
        if self._is_wanted(alarm, alarm.key):
            self._group.create_task(self._submit(alarm), name=f"alarm-{alarm.id}-{alarm.key}")

    def _is_wanted(self, alarm: SetAlarm, key: str) -> bool:
        return self._engine.world.wants_alarm(alarm.owner, alarm.id, key)

    async def _submit(self, alarm: SetAlarm) -> None:
        rang = AlarmRang(owner=alarm.owner, id=alarm.id, key=alarm.key)
        try:
            # No fixed id: an alarm that rang into a pause, in which it means nothing, may ring again afterwards.
            await self._engine.submit(rang)
        except InvalidTransition:
            return  # its owner has ended since the timer fired
