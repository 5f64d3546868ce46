"""The API of trigger rules, and the webhook for CloudEvents."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import asdict
from datetime import UTC, datetime

from aiohttp import web

from fedtide.coordinator.adapters import notices, schedules
from fedtide.coordinator.adapters.starting import rollout_request
from fedtide.coordinator.api.access import ORIGIN_ASKS
from fedtide.coordinator.api.cloud_events import BATCH, read_signals
from fedtide.coordinator.api.http import Listing, answer, name_in, page_of, query_of, read_body
from fedtide.coordinator.api.routes import TEXT, Route, delete, get, post, put
from fedtide.coordinator.conditions import check
from fedtide.coordinator.log.engine import Engine
from fedtide.coordinator.triggers import triggers
from fedtide.fabric.errors import ConfigError
from fedtide.fabric.events.envelope import SignalReceived, TriggerApplied, TriggerRemoved
from fedtide.fabric.messages.views import FiringView, Page, SignalReceipt, SignalReceipts, TriggerTest, TriggerView
from fedtide.fabric.plans.trigger_rule import Signal, StartRollout, TriggerRule, matches_type

EVENT = "application/cloudevents+json"


class TriggerApi:
    """Handlers over the engine's rules."""

    def __init__(self, engine: Engine, channels: Collection[str] = ()) -> None:
        """`channels`: what rules may tell something through."""
        self._engine = engine
        self._channels = channels

    def routes(self) -> list[Route]:
        return [
            get("/v1/triggers", self._all, "Trigger rules", Page[TriggerView], query=Listing),
            put("/v1/triggers/{name}", self._apply, "Create or change a rule", TriggerView, body=TriggerRule),
            get("/v1/triggers/{name}", self._one, "One rule", TriggerView),
            delete("/v1/triggers/{name}", self._remove, "Remove a rule", TriggerView),
            post(
                "/v1/triggers/{name}/test",
                self._test,
                "What an event would do",
                TriggerTest,
                takes=EVENT,
            ),
            post(
                "/v1/events",
                self._receive,
                "An event from outside (CloudEvents 1.0)",
                takes=EVENT,
                status=202,
            ),
            Route("OPTIONS", "/v1/events", self._handshake, "May events be delivered here?", media=TEXT, is_open=True),
        ]

    def view(self, name: str) -> TriggerView:
        return trigger_view(self._engine.world.trigger(name))

    async def _all(self, request: web.Request) -> web.Response:
        return answer(self.page(query_of(request, Listing)))

    def page(self, query: Listing) -> Page[TriggerView]:
        return page_of(query, sorted(self._engine.world.triggers), self.view)

    async def _one(self, request: web.Request) -> web.Response:
        return answer(self.view(name_in(request, "name")))

    async def _apply(self, request: web.Request) -> web.Response:
        rule, name = await read_body(request, TriggerRule), name_in(request, "name")
        if rule.name != name:
            raise ConfigError("name", f"is {rule.name!r}, the URL says {name!r}")
        if rule.where:
            check("where", rule.where)
        if rule.schedule is not None:
            schedules.next_after(rule.schedule, datetime.now(UTC))
        if isinstance(rule.do, StartRollout):
            rollout_request(rule.do)
        notices.check(rule, self._channels)
        await self._engine.submit(TriggerApplied(rule=rule))
        return answer(self.view(rule.name))

    async def _remove(self, request: web.Request) -> web.Response:
        removed = self.view(name_in(request, "name"))
        await self._engine.submit(TriggerRemoved(name=removed.trigger))
        return answer(removed)

    async def _test(self, request: web.Request) -> web.Response:
        """What an event would do, without doing it."""
        state, signal = self._engine.world.trigger(name_in(request, "name")), await _one_signal(request)
        if not matches_type(state.rule, signal.type):
            reason = f"the rule listens to {state.rule.type}"
            return answer(TriggerTest(rule=state.rule.name, signal=signal, outcome="not listening", reason=reason))
        outcome, reason = triggers.judge(state, signal, datetime.now(UTC))
        starts = triggers.started_id(state.rule, signal) if outcome in ("fired", "queued") else None
        return answer(
            TriggerTest(rule=state.rule.name, signal=signal, outcome=outcome, reason=reason, would_start=starts)
        )

    async def _receive(self, request: web.Request) -> web.Response:
        """An event from outside; the same id counts once."""
        signals = read_signals(request.headers.get("Content-Type", ""), request.headers, await request.read())
        receipts = []
        for signal in signals:
            await self._engine.submit(SignalReceived(signal=signal), id=f"signal.{signal.id}")
            last = {n: t.history[-1] for n, t in self._engine.world.triggers.items() if t.history}
            judged = {n: line.outcome for n, line in last.items() if line.signal == signal.id}
            receipts.append(SignalReceipt(id=signal.id, rules=judged))
        is_batch = request.content_type == BATCH
        return answer(SignalReceipts(events=receipts) if is_batch else receipts[0], status=202)

    async def _handshake(self, request: web.Request) -> web.Response:
        """A sender asks whether it may deliver events here (CloudEvents' web hooks, section 4)."""
        origin = request.headers.get(ORIGIN_ASKS)
        if origin is None:
            raise web.HTTPBadRequest(text=f"a handshake has a header {ORIGIN_ASKS}")
        rate = request.headers.get("WebHook-Request-Rate", "*")
        told = {"WebHook-Allowed-Origin": origin, "WebHook-Allowed-Rate": rate, "Allow": "GET, POST, OPTIONS"}
        return web.Response(headers=told)


async def _one_signal(request: web.Request) -> Signal:
    """Raises ConfigError: no CloudEvent, or several."""
    signals = read_signals(request.headers.get("Content-Type", ""), request.headers, await request.read())
    if len(signals) != 1:
        raise ConfigError("body", f"holds {len(signals)} events: one is judged at a time")
    return signals[0]


def trigger_view(state: triggers.Trigger) -> TriggerView:
    rule = state.rule
    return TriggerView(
        trigger=rule.name,
        on=rule.type,
        where=rule.where,
        does=rule.do.kind,
        policy=rule.policy,
        fired=state.fired,
        budget=rule.budget,
        active=state.active,
        queued=len(state.queue),
        rule=rule,
        history=[FiringView(**asdict(line)) for line in state.history],
    )
