"""Asks the coordinator for newer metadata, and checks with what is known: of a node, or of a region's process."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from typing import TypeVar

from fedtide.fabric.encoding import from_json, to_json
from fedtide.fabric.errors import MalformedMessage, TransientError
from fedtide.fabric.ids import unguessable
from fedtide.fabric.messages.orders import OrderList, OrdersQuestion
from fedtide.fabric.nats.broker import Broker
from fedtide.fabric.trust.chain import Chain
from fedtide.fabric.trust.refusals import Untrusted
from fedtide.fabric.trust.signatures import AT, MessageCheck
from fedtide.fabric.trust.store import TrustStore

log = logging.getLogger(__name__)

T = TypeVar("T")
ANSWER_WITHIN_S = 10.0
ASK_PAUSE_S = 5.0
"""So often, at most, newer metadata are asked for because something was not believed."""
MENDABLE = ("unknown_signer", "freeze", "expired", "wrong_target")
"""What newer metadata may say otherwise."""


class TrustLink:
    """`path`: what the director signs for whoever asks (`chain.order_path`)."""

    def __init__(self, store: TrustStore, broker: Broker, question: str, path: str) -> None:
        self.store = store
        self._broker = broker
        self._question = question
        self._path = path
        self._asked: float | None = None
        self.doubted = asyncio.Event()
        """Something was refused that newer metadata may allow, and they were asked for just before."""
        self.messages = MessageCheck()

    async def orders(self) -> tuple[OrderList, bool]:
        """The coordinator's answer, and whether it is signed (or nothing is, here); metadata in it are kept.

        Raises:
            TransientError: it does not answer.
        """
        self._asked = time.monotonic()
        nonce = unguessable()
        question = OrdersQuestion(known=self.store.known, nonce=nonce)
        got = await self._broker.ask_with_headers(self._question, to_json(question), {}, timeout_s=ANSWER_WITHIN_S)
        try:
            answer = from_json(OrderList, got.data, "orders")
        except MalformedMessage as exc:  # of whoever is on the way: the next one may be better
            raise TransientError(f"the answer cannot be read: {exc.what}") from exc
        try:
            if answer.trust is not None:
                self.store.take(answer.trust)
            if (chain := self.store.chain) is None:
                if self.store.is_pinned:
                    raise Untrusted("freeze", "nobody has sent the root that the join token names")
                return answer, True
            if got.headers.get(AT) != nonce:
                raise Untrusted("arbitrary", "the answer is to another question, or to none")
            self.messages.check(chain, self._path, self._question, got.data, got.headers, self.store.now())
        except Untrusted as exc:
            log.warning("trust.answer_not_believed", extra={"reason": str(exc)})
            return answer, False
        if answer.now is not None:
            self.store.told(answer.now)
        return answer, True

    async def verified(self, check: Callable[[Chain, float], T]) -> T | None:
        """What `check` returns of the metadata and the time; None: this installation signs nothing.

        Newer metadata are asked for once, if they may say otherwise.

        Raises:
            Untrusted: as `check`.
        """
        if self.store.chain is None and self._asked is None:
            await self._ask()
        try:
            return self._once(check)
        except Untrusted as exc:
            if exc.kind not in MENDABLE:
                raise
            if not await self._ask():
                self.doubted.set()
                raise
        return self._once(check)

    def _once(self, check: Callable[[Chain, float], T]) -> T | None:
        if self.store.chain is not None:
            return check(self.store.chain, self.store.now())
        if self.store.is_pinned:
            raise Untrusted("freeze", "nobody has sent the root that the join token names")
        return None

    async def _ask(self) -> bool:
        """Whether there was an answer, to a question that was not asked just before."""
        if self._asked is not None and time.monotonic() < self._asked + ASK_PAUSE_S:
            return False
        try:
            await self.orders()
        except TransientError as exc:
            log.info("trust.not_asked", extra={"reason": str(exc)})
            return False
        return True
