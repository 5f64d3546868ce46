"""Tells nodes which orders there are for them: the subjects only; what an order says they read from their region.

A node has no right to list: such a request says in its body what it is about. Here the node is that of the subject.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from fedtide.coordinator.adapters.director import Director
from fedtide.coordinator.adapters.distribution import Distribution
from fedtide.coordinator.identity import identities
from fedtide.coordinator.log.engine import Engine
from fedtide.fabric.encoding import from_json, to_json
from fedtide.fabric.messages.orders import OrderList, OrdersQuestion
from fedtide.fabric.nats.broker import Broker
from fedtide.fabric.nats.jetstream import Received
from fedtide.fabric.nats.subjects import DOWN, ORDERS, OrderFor, OrdersAsked, Subjects, parse_as


class OrderLists:
    """Answers nodes that connect, while this coordinator leads."""

    def __init__(
        self, broker: Broker, subjects: Subjects, regions: Sequence[str], engine: Engine, director: Director
    ) -> None:
        self._broker = broker
        self._director = director
        self._distribution = Distribution(broker, subjects, director)
        self._checked: tuple[str, set[str]] = ("", set())
        """Nodes whose desired states are signed with these keys."""
        self._engine = engine
        self._subjects = subjects
        self._regions = regions

    async def listen(self) -> None:
        # One subscription per region: the permissions of a region's server do not let a wider one through.
        for region in self._regions:
            await self._broker.answer(self._subjects.orders(region, "*"), self._on_question)

    async def _on_question(self, message: Received) -> tuple[bytes, dict[str, str]]:
        asker = parse_as(OrdersAsked, message.subject)
        asked = from_json(OrdersQuestion, message.data or b"{}", "question")
        pattern = self._subjects.down_node(asker.region, asker.node)
        # Orders first: an agent that was away rolls back before it trains.
        found = [
            subject for stream in (ORDERS, DOWN) for subject in sorted(await self._broker.subjects_of(stream, pattern))
        ]
        world = self._engine.world
        await self._sign_again(asker.node, [subject for subject in found if _is_desired(subject)])
        member = identities.why_no_member(world.identities, asker.region, asker.node) is None
        told = OrderList(
            subjects=found,
            now=time.time(),
            epoch=world.epoch.id,
            member=member,
            trust=self._director.newer_than(asked.known) if asked.known is not None else None,
        )
        answer = to_json(told)
        return answer, self._director.headers(message.subject, answer, asked.nonce) if asked.nonce else {}

    async def _sign_again(self, node: str, desired: Sequence[str]) -> None:
        """Before a node reads them, once for each key: it may have been away when the keys changed."""
        keys = self._director.key_ids
        if self._checked[0] != keys:
            self._checked = keys, set()
        if node not in self._checked[1]:
            for subject in desired:
                await self._distribution.sign_again(subject)
            self._checked[1].add(node)


def _is_desired(subject: str) -> bool:
    return parse_as(OrderFor, subject).kind == "desired"
