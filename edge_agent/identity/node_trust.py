"""What this node believes: orders, apps, releases and questions are checked before they have an effect."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

from fedtide.edge_agent.config import AgentConfig
from fedtide.fabric.encoding import to_json
from fedtide.fabric.errors import ConfigError
from fedtide.fabric.events.identity import OrderRefused
from fedtide.fabric.messages.orders import OrderList
from fedtide.fabric.messages.tasks import Cancel, Task
from fedtide.fabric.messages.trust import RefusalKind, Refused
from fedtide.fabric.messages.views import Problem
from fedtide.fabric.nats.broker import Answerer, Broker
from fedtide.fabric.nats.jetstream import Received
from fedtide.fabric.nats.node_answers import STATUS
from fedtide.fabric.nats.subjects import Subjects
from fedtide.fabric.plans.run_spec import AppRef
from fedtide.fabric.trust import provenance
from fedtide.fabric.trust.chain import Chain, order_path
from fedtide.fabric.trust.claims import publishers_of
from fedtide.fabric.trust.link import ASK_PAUSE_S, TrustLink
from fedtide.fabric.trust.refusals import Untrusted
from fedtide.fabric.trust.signatures import AT, Vouched
from fedtide.fabric.trust.store import TrustStore

log = logging.getLogger(__name__)

QUESTION_FRESH_S = 300.0
"""A question that was signed longer ago is not answered: it may be an old one, sent again."""
TOLD_AGAIN_S = 600.0
MOST_TOLD = 256

T = TypeVar("T")
Tell = Callable[[OrderRefused], Awaitable[None]]


def trust_store(config: AgentConfig) -> TrustStore:
    """Raises ConfigError: the root that the configuration names cannot be read."""
    root = ""
    if config.trust_root is not None:
        try:
            root = config.trust_root.read_text(encoding="utf-8")
        except OSError as exc:
            raise ConfigError("trust_root", f"cannot be read: {exc.strerror}") from exc
    return TrustStore(config.data_dir / "trust", root)


class NodeTrust:
    """Of one connection. `tell` reports what was refused: each once in a while."""

    def __init__(self, config: AgentConfig, store: TrustStore, broker: Broker, tell: Tell) -> None:
        self._config = config
        self._tell = tell
        self._path = order_path(config.region, config.node)
        question = Subjects(config.tenant).orders(config.region, config.node)
        self._link = TrustLink(store, broker, question, self._path)
        self._told: dict[tuple[Refused, RefusalKind, str], float] = {}
        self._apps: dict[tuple[str, str], frozenset[str]] = {}

    async def until_doubtful(self) -> None:
        """Until something was refused that newer metadata may allow, and it is time to ask for them."""
        await self._link.doubted.wait()
        await asyncio.sleep(ASK_PAUSE_S)
        self._link.doubted.clear()

    async def orders(self) -> tuple[OrderList, bool]:
        """Which orders there are, and whether the coordinator has signed that."""
        return await self._link.orders()

    async def desired(self, message: Received) -> None:
        """Raises Untrusted: no director has ordered that of this node."""
        await self._checked("desired", message.subject, lambda c, n: self._of_director(c, message, n))

    async def order(self, message: Received, order: Task | Cancel) -> None:
        """Raises Untrusted: whoever has sent a task or its end may not."""
        if isinstance(order, Task):
            await self._checked("task", order.task, lambda c, n: self._of_run(c, message, order, n))
        else:
            await self._checked("cancel", order.task, lambda c, n: self._of_anybody(c, message, order, n))

    async def app(self, app: AppRef) -> frozenset[str]:
        """The roles that vouch for an app; none, where nothing is signed. Raises Untrusted."""

        def check(chain: Chain, now: float) -> frozenset[str]:
            key = chain.files.targets, app.model_dump_json()
            if key not in self._apps:
                self._apps = {key: publishers_of(chain, app, now)}
            chain.check_current(now)
            return self._apps[key]

        return await self._checked("app", app.name, check) or frozenset()

    async def release(self, manifest: bytes, envelope: str, name: str) -> frozenset[str]:
        """The roles that vouch for a release; none, where nothing is signed. Raises Untrusted, MalformedMessage."""

        def check(chain: Chain, now: float) -> frozenset[str]:
            if not envelope:
                raise Untrusted("arbitrary", f"nobody vouches for release {name}")
            return provenance.attested(chain, manifest, envelope, now).roles

        return await self._checked("release", name, check) or frozenset()

    def guarded(self, handler: Answerer) -> Answerer:
        """Answers only questions that the director has asked, and asked now."""

        async def ask(message: Received) -> tuple[bytes, dict[str, str]]:
            try:
                await self._checked("question", message.subject, lambda c, n: self._asked_now(c, message, n))
            except Untrusted as exc:
                refused = Problem(title="Refused", status=400, detail=exc.what, remedy=exc.remedy, exit_code=77)
                return to_json(refused), {STATUS: "400"}
            return await handler(message)

        return ask

    async def refused(self, what: Refused, kind: RefusalKind, about: str, reason: str) -> None:
        """Tell the coordinator, unless it was told just before."""
        key, now = (what, kind, about), time.monotonic()
        if now < self._told.get(key, float("-inf")) + TOLD_AGAIN_S:
            return
        while len(self._told) >= MOST_TOLD:
            del self._told[next(iter(self._told))]
        self._told[key] = now
        log.warning("order.refused", extra={"what": what, "kind": kind, "about": about, "reason": reason})
        data = OrderRefused(node=self._config.node, what=what, refusal=kind, about=about[:200], reason=reason[:1000])
        await self._tell(data)

    async def _checked(self, what: Refused, about: str, check: Callable[[Chain, float], T]) -> T | None:
        try:
            return await self._link.verified(check)
        except Untrusted as exc:
            await self.refused(what, exc.kind, about, exc.what)
            raise

    def _vouched(self, chain: Chain, message: Received, now: float) -> Vouched:
        return self._link.messages.check(chain, self._path, message.subject, message.data, message.headers, now)

    def _of_director(self, chain: Chain, message: Received, now: float) -> None:
        if self._vouched(chain, message, now).mandate is not None:
            raise Untrusted("wrong_target", "the mandate of a run says nothing of what is served")

    def _of_run(self, chain: Chain, message: Received, task: Task, now: float) -> None:
        mandate = self._vouched(chain, message, now).mandate
        if mandate is None:
            raise Untrusted("arbitrary", "a task comes from an aggregator, with the mandate of its run")
        _check_named(task)
        if (mandate.run, mandate.app) != (task.run, task.app.bundle.digest):
            raise Untrusted("wrong_target", f"the mandate is for run {mandate.run}, with another app or run than this")

    def _of_anybody(self, chain: Chain, message: Received, order: Cancel, now: float) -> None:
        mandate = self._vouched(chain, message, now).mandate
        _check_named(order)
        if mandate is not None and mandate.run != order.run:
            raise Untrusted("wrong_target", f"the mandate is for run {mandate.run}, not {order.run}")

    def _asked_now(self, chain: Chain, message: Received, now: float) -> None:
        self._of_director(chain, message, now)
        try:
            asked = float(message.headers.get(AT, ""))
        except ValueError as exc:
            raise Untrusted("arbitrary", "the question does not say when it was asked") from exc
        if not abs(now - asked) <= QUESTION_FRESH_S:
            raise Untrusted("expired", f"the question was asked {now - asked:.0f} s ago")


def _check_named(order: Task | Cancel) -> None:
    """A node knows tasks by their ids, and these begin with their runs: else one run would end another's."""
    if not order.task.startswith(f"{order.run}-"):
        raise Untrusted("wrong_target", f"{order.task!r} is no task of run {order.run}")
