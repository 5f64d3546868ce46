"""Which nodes are online: turns heartbeats into `node.online` and `node.offline`. No polling.

Keeps the last heartbeat of each node for display; none of it is state that must survive.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable

from fedtide.coordinator.fleet.fleet import Node
from fedtide.coordinator.identity import identities
from fedtide.coordinator.log.engine import Engine
from fedtide.fabric.encoding import from_json
from fedtide.fabric.errors import InvalidTransition
from fedtide.fabric.events.envelope import EventData, NodeOffline, NodeOnline
from fedtide.fabric.messages.heartbeat import SLOWEST_HEARTBEAT_S, Heartbeat
from fedtide.fabric.nats.broker import Broker
from fedtide.fabric.nats.jetstream import Received
from fedtide.fabric.nats.subjects import RESERVED, Subjects, Telemetry, parse_as

log = logging.getLogger(__name__)

MISSED_BEATS = 3
DEFAULT_HEARTBEAT_S = 5.0
FASTEST_HEARTBEAT_S = 0.1


class Presence:
    """Watches heartbeats; a node that misses three is offline."""

    def __init__(
        self,
        broker: Broker,
        subjects: Subjects,
        engine: Engine,
        group: asyncio.TaskGroup,
        *,
        members_only: bool = False,
    ) -> None:
        """`members_only`: nodes have identities, and nobody else is believed."""
        self._members_only = members_only
        self._broker = broker
        self._subjects = subjects
        self._engine = engine
        self._group = group
        self._timers: dict[str, asyncio.TimerHandle] = {}
        self._under_way: set[str] = set()
        """Nodes whose change is on its way into the log: while that waits, each heartbeat would be another one."""
        self.heartbeats: dict[str, Heartbeat] = {}
        self.hearers: list[Callable[[Node, Heartbeat], None]] = []
        """Told of each heartbeat."""
        self.worker_hearers: list[Callable[[str, str, Heartbeat], None]] = []
        """Told of a region's drift collector and regional aggregator: region, name, heartbeat."""
        self.clock_ahead_s: dict[str, float] = {}
        """By how much each node's clock is ahead of this one, including the way of its heartbeat."""
        self._boots: dict[str, list[str]] = {}
        self.twins: dict[str, float] = {}
        """Nodes of which two processes were heard, and when last."""

    async def start(self) -> None:
        """Listen, and give every node that is online by the log time to send a heartbeat."""
        await self._broker.subscribe(self._subjects.all_telemetry, self._on_beat)
        for name in self._engine.world.nodes:
            self.changed(name)

    def changed(self, name: str) -> None:
        """A node that is online by the log owes a heartbeat, also if it has never sent one."""
        node = self._engine.world.nodes.get(name)
        if node is not None and node.online and name not in self._timers:
            self._expect(name, node.capabilities.heartbeat_s)

    async def _on_beat(self, message: Received) -> None:
        sender = parse_as(Telemetry, message.subject)
        name = sender.node
        beat = from_json(Heartbeat, message.data, f"heartbeat of {name}")
        if name in RESERVED:
            for hear_worker in self.worker_hearers:
                hear_worker(sender.region, name, beat)
            return
        node = self._engine.world.nodes.get(name)
        if self._members_only and identities.why_no_member(self._engine.world.identities, sender.region, name):
            return
        if node is None or node.region != sender.region:
            return  # it joins first; a region may make up any number of names
        self._note_clock(name, beat)
        self._note_twins(name, beat)
        for hear in self.hearers:
            hear(node, beat)
        if beat.bye:
            self._say(name, NodeOffline(node=name, reason="stopped"))
            return
        before = self.heartbeats.get(name)
        self.heartbeats[name] = beat
        if before is None or (before.busy, before.stage) != (beat.busy, beat.stage):
            self._engine.nudge()
        self._expect(name, beat.heartbeat_s)
        if not node.online:
            self._say(name, NodeOnline(node=name))

    def _note_clock(self, name: str, beat: Heartbeat) -> None:
        if beat.clock is not None:
            self.clock_ahead_s[name] = round(beat.clock - time.time(), 1)

    def _note_twins(self, name: str, beat: Heartbeat) -> None:
        """Two processes with one identity take turns: a start that was followed by another is heard again."""
        seen = self._boots.setdefault(name, [])
        if beat.boot and beat.boot not in seen:
            seen.append(beat.boot)
            del seen[:-2]
        elif beat.boot and beat.boot != seen[-1]:
            seen.reverse()
            if name not in self.twins:
                log.error("presence.twins", extra={"node": name, "boots": seen})
            self.twins[name] = time.time()

    def _expect(self, name: str, heartbeat_s: float) -> None:
        if timer := self._timers.pop(name, None):
            timer.cancel()
        allowed = FASTEST_HEARTBEAT_S <= heartbeat_s <= SLOWEST_HEARTBEAT_S  # false for NaN
        seconds = MISSED_BEATS * (heartbeat_s if allowed else DEFAULT_HEARTBEAT_S)
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
        if name not in self._under_way:
            self._under_way.add(name)
            self._group.create_task(self._submit(name, data))

    async def _submit(self, name: str, data: EventData) -> None:
        try:
            await self._engine.submit(data)
        except InvalidTransition as exc:
            log.info("presence.ignored", extra={"reason": str(exc)})
        finally:
            self._under_way.discard(name)
