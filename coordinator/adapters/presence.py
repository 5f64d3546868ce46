"""Which nodes are there: heartbeats in, `node.online` and `node.offline` out. No polling.

Keeps the last telemetry of each node for display; none of it is state that must survive.
"""

from __future__ import annotations

import asyncio
import json
import logging
from typing import Any

from fedtide.coordinator.identity import identities
from fedtide.coordinator.log.engine import Engine
from fedtide.fabric.errors import InvalidTransition, MalformedMessage
from fedtide.fabric.events.envelope import EventData, NodeOffline, NodeOnline
from fedtide.fabric.nats.broker import Broker
from fedtide.fabric.nats.jetstream import Received
from fedtide.fabric.nats.subjects import Subjects, last_token

log = logging.getLogger(__name__)

MISSED_BEATS = 3
DEFAULT_HEARTBEAT_S = 5.0


class Presence:
    """Watches heartbeats; a node that misses three is offline."""

    def __init__(self, broker: Broker, subjects: Subjects, engine: Engine, group: asyncio.TaskGroup) -> None:
        self._broker = broker
        self._subjects = subjects
        self._engine = engine
        self._group = group
        self._timers: dict[str, asyncio.TimerHandle] = {}
        self.telemetry: dict[str, dict[str, Any]] = {}

    async def start(self) -> None:
        """Listen, and give every node that the log calls online its time to show up."""
        await self._broker.subscribe(self._subjects.all_telemetry, self._on_beat)
        for node in self._engine.world.nodes.values():
            if node.online:
                self._expect(node.name, DEFAULT_HEARTBEAT_S)

    async def _on_beat(self, message: Received) -> None:
        name = last_token(message.subject)
        try:
            beat = json.loads(message.data)
        except ValueError as exc:
            raise MalformedMessage(f"telemetry of {name} is not JSON") from exc
        node = self._engine.world.nodes.get(name)
        if identities.is_revoked(self._engine.world.identities, name):
            return
        if beat.get("bye"):
            self._say(name, NodeOffline(node=name, reason="stopped"))
            return
        before = self.telemetry.get(name, {})
        self.telemetry[name] = beat
        if any(before.get(field) != beat.get(field) for field in ("busy", "stage")):
            self._engine.nudge()
        self._expect(name, float(beat.get("heartbeat_s", DEFAULT_HEARTBEAT_S)))
        if node is not None and not node.online:
            self._say(name, NodeOnline(node=name))

    def _expect(self, name: str, heartbeat_s: float) -> None:
        if timer := self._timers.pop(name, None):
            timer.cancel()
        seconds = MISSED_BEATS * heartbeat_s
        loop = asyncio.get_running_loop()
        reason = f"no heartbeat for {seconds:.0f} s"
        self._timers[name] = loop.call_later(seconds, self._say, name, NodeOffline(node=name, reason=reason))

    def _say(self, name: str, data: EventData) -> None:
        if isinstance(data, NodeOffline):
            if timer := self._timers.pop(name, None):
                timer.cancel()
            node = self._engine.world.nodes.get(name)
            if node is None or not node.online:
                return
        self._group.create_task(self._submit(data))

    async def _submit(self, data: EventData) -> None:
        try:
            await self._engine.submit(data)
        except InvalidTransition as exc:
            log.info("presence.ignored", extra={"reason": str(exc)})
