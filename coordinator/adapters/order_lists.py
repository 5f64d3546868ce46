"""Tells nodes which orders there are for them: the subjects only; what an order says they read from their region.

A node has no right to list: such a request says in its body what it is about. Here the node is that of the subject.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from fedtide.coordinator.identity import identities
from fedtide.coordinator.log.engine import Engine
from fedtide.fabric.encoding import to_json
from fedtide.fabric.messages.orders import OrderList
from fedtide.fabric.nats.broker import Broker
from fedtide.fabric.nats.jetstream import Received
from fedtide.fabric.nats.subjects import DOWN, ORDERS, OrdersAsked, Subjects, parse_as


class OrderLists:
    """Answers nodes that connect, while this coordinator leads."""

    def __init__(self, broker: Broker, subjects: Subjects, regions: Sequence[str], engine: Engine) -> None:
        self._broker = broker
        self._engine = engine
        self._subjects = subjects
        self._regions = regions

    async def listen(self) -> None:
        # One subscription per region: the permissions of a region's server do not let a wider one through.
        for region in self._regions:
            await self._broker.answer(self._subjects.orders(region, "*"), self._on_question)

    async def _on_question(self, message: Received) -> tuple[bytes, dict[str, str]]:
        asker = parse_as(OrdersAsked, message.subject)
        pattern = self._subjects.down_node(asker.region, asker.node)
        # Orders first: an agent that was away rolls back before it trains.
        found = [
            subject for stream in (ORDERS, DOWN) for subject in sorted(await self._broker.subjects_of(stream, pattern))
        ]
        world = self._engine.world
        member = identities.why_no_member(world.identities, asker.region, asker.node) is None
        return to_json(OrderList(subjects=found, now=time.time(), epoch=world.epoch.id, member=member)), {}
