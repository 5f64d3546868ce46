"""The API of trigger rules, and the webhook: CloudEvents 1.0 in binary and structured mode.

https://github.com/cloudevents/spec/blob/v1.0.2/cloudevents/bindings/http-protocol-binding.md
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any
from urllib.parse import unquote

from aiohttp import web
from pydantic import ValidationError

from fedtide.coordinator.adapters import schedules
from fedtide.coordinator.adapters.starting import rollout_request
from fedtide.coordinator.api.http import Listing, answer, name_in, page_of, parse_json, query_of, read_body
from fedtide.coordinator.conditions import check
from fedtide.coordinator.log.engine import Engine
from fedtide.coordinator.triggers import triggers
from fedtide.fabric.errors import ConfigError
from fedtide.fabric.events.envelope import SignalReceived, TriggerApplied, TriggerRemoved
from fedtide.fabric.flower.apps import flatten
from fedtide.fabric.messages.views import FiringView, SignalReceipt, TriggerTest, TriggerView
from fedtide.fabric.plans.trigger_rule import Signal, StartRollout, TriggerRule, matches_type
from fedtide.fabric.validation import config_error

_STRUCTURED = "application/cloudevents+json"


class TriggerApi:
    """Handlers over the engine's rules."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def routes(self) -> list[web.RouteDef]:
        return [
            web.get("/v1/triggers", self._all),
            web.put("/v1/triggers/{name}", self._apply),
            web.get("/v1/triggers/{name}", self._one),
            web.delete("/v1/triggers/{name}", self._remove),
            web.post("/v1/triggers/{name}/test", self._test),
            web.post("/v1/events", self._receive),
        ]

    def _view(self, name: str) -> TriggerView:
        return view(self._engine.world.trigger(name))

    async def _all(self, request: web.Request) -> web.Response:
        return page_of(query_of(request, Listing), sorted(self._engine.world.triggers), self._view)

    async def _one(self, request: web.Request) -> web.Response:
        return answer(self._view(name_in(request, "name")))

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
        await self._engine.submit(TriggerApplied(rule=rule))
        return answer(self._view(rule.name))

    async def _remove(self, request: web.Request) -> web.Response:
        removed = self._view(name_in(request, "name"))
        await self._engine.submit(TriggerRemoved(name=removed.trigger))
        return answer(removed)

    async def _test(self, request: web.Request) -> web.Response:
        """What an event would do, without doing it."""
        state, signal = self._engine.world.trigger(name_in(request, "name")), await read_signal(request)
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
        signal = await read_signal(request)
        await self._engine.submit(SignalReceived(signal=signal), id=f"signal.{signal.id}")
        last = {n: t.history[-1] for n, t in self._engine.world.triggers.items() if t.history}
        judged = {n: line.outcome for n, line in last.items() if line.signal == signal.id}
        return answer(SignalReceipt(id=signal.id, rules=judged), status=202)


async def read_signal(request: web.Request) -> Signal:
    """The CloudEvent of a request as a signal: attributes and `data` become flat fields.

    Raises:
        ConfigError: no CloudEvent, or data that is not an object of plain values.
    """
    body = await request.read()
    if request.content_type == _STRUCTURED:
        attributes = _object("body", body)
        data = attributes.pop("data", {})
    else:
        attributes = _attributes(request.headers)
        data = _object("data", body) if body else {}
    for name in ("id", "source", "type"):
        if not attributes.get(name) or not isinstance(attributes[name], str):
            raise ConfigError(
                name, "every CloudEvent has one, and it is text", f"Send {_STRUCTURED}, or ce-id, ce-type, ... headers"
            )
    if not isinstance(data, dict):
        raise ConfigError("data", "must be a JSON object")
    plain = {k: v for k, v in attributes.items() if k not in ("id", "type", "specversion", "datacontenttype")}
    try:
        fields = {**flatten(plain, "attributes"), **flatten(data, "data")}
        # CloudEvents: source and id together are the identity.
        identity = f"{attributes.get('source', '')}#{attributes['id']}"
        return Signal(id=identity, type=str(attributes["type"]), fields=fields)
    except ValidationError as exc:
        raise config_error(exc, Signal, "event") from exc


def _attributes(headers: Mapping[str, str]) -> dict[str, Any]:
    """The `ce-` headers, decoded as the binding says: percent-encoded UTF-8 (section 3.1.3.2).

    Raises:
        ConfigError: a header that is neither ASCII nor percent-encoded UTF-8.
    """
    found: dict[str, Any] = {}
    for name, value in headers.items():
        if not name.lower().startswith("ce-"):
            continue
        try:
            found[name[3:].lower()] = unquote(value.encode("utf-8").decode(), errors="strict")
        except UnicodeError as exc:
            raise ConfigError(
                name, "is not UTF-8", "Write characters beyond ASCII percent-encoded, as CloudEvents' HTTP binding says"
            ) from exc
    return found


def _object(path: str, body: bytes) -> dict[str, Any]:
    value = parse_json(path, body)
    if not isinstance(value, dict):
        raise ConfigError(path, "must be a JSON object")
    return value


def view(state: triggers.Trigger) -> TriggerView:
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
