"""The API of trigger rules, and the webhook: CloudEvents 1.0 in binary and structured mode.

https://github.com/cloudevents/spec/blob/v1.0.2/cloudevents/bindings/http-protocol-binding.md
"""

from __future__ import annotations

import json
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

from aiohttp import web
from pydantic import ValidationError

from fedtide.coordinator.adapters import schedules
from fedtide.coordinator.adapters.starting import rollout_request
from fedtide.coordinator.api.http_api import read_body
from fedtide.coordinator.conditions import check
from fedtide.coordinator.log.engine import Engine
from fedtide.coordinator.triggers import triggers
from fedtide.fabric.errors import ConfigError
from fedtide.fabric.events.envelope import SignalReceived, TriggerApplied, TriggerRemoved
from fedtide.fabric.flower.apps import flatten
from fedtide.fabric.plans.trigger_rule import Signal, StartRollout, TriggerRule, matches_type

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

    async def _all(self, _: web.Request) -> web.Response:
        return web.json_response([view(t) for _, t in sorted(self._engine.world.triggers.items())])

    async def _one(self, request: web.Request) -> web.Response:
        return web.json_response(view(self._engine.world.trigger(request.match_info["name"])))

    async def _apply(self, request: web.Request) -> web.Response:
        rule = await read_body(request, TriggerRule)
        if rule.name != request.match_info["name"]:
            raise ConfigError("name", f"is {rule.name!r}, the address says {request.match_info['name']!r}")
        check("where", rule.where) if rule.where else None
        if rule.schedule is not None:
            schedules.next_after(rule.schedule, datetime.now(UTC))
        if isinstance(rule.do, StartRollout):
            rollout_request(rule.do)
        await self._engine.submit(TriggerApplied(rule=rule))
        return web.json_response(view(self._engine.world.trigger(rule.name)))

    async def _remove(self, request: web.Request) -> web.Response:
        name = request.match_info["name"]
        self._engine.world.trigger(name)
        await self._engine.submit(TriggerRemoved(name=name))
        return web.json_response({"removed": name})

    async def _test(self, request: web.Request) -> web.Response:
        """What an event would do, without doing it."""
        state, signal = self._engine.world.trigger(request.match_info["name"]), await read_signal(request)
        if not matches_type(state.rule, signal.type):
            answer = {"outcome": "not listening", "reason": f"the rule listens to {state.rule.type}"}
        else:
            outcome, reason = triggers.judge(state, signal, datetime.now(UTC))
            answer = {"outcome": outcome, "reason": reason}
            if outcome in ("fired", "queued"):
                answer["would_start"] = triggers.started_id(state.rule, signal)
        return web.json_response({"rule": state.rule.name, "signal": signal.model_dump(), **answer})

    async def _receive(self, request: web.Request) -> web.Response:
        """An event from outside; the same id counts once."""
        signal = await read_signal(request)
        await self._engine.submit(SignalReceived(signal=signal), id=f"signal.{signal.id}")
        named = {n: t.history[-1] for n, t in self._engine.world.triggers.items() if t.history}
        judged = {n: line.outcome for n, line in named.items() if line.signal == signal.id}
        return web.json_response({"id": signal.id, "rules": judged}, status=202)


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
        attributes = {k[3:].lower(): v for k, v in request.headers.items() if k.lower().startswith("ce-")}
        data = _object("data", body) if body else {}
    for name in ("id", "type"):
        if not attributes.get(name):
            raise ConfigError(name, "a CloudEvent needs it", f"Send {_STRUCTURED}, or ce-id, ce-type, ... headers")
    if not isinstance(data, dict):
        raise ConfigError("data", "must be a JSON object")
    plain = {k: v for k, v in attributes.items() if k not in ("id", "type", "specversion", "datacontenttype")}
    try:
        fields = {**flatten(plain, "attributes"), **flatten(data, "data")}
        # CloudEvents: source and id together are the identity.
        identity = f"{attributes.get('source', '')}#{attributes['id']}"
        return Signal(id=identity, type=str(attributes["type"]), fields=fields)
    except ValidationError as exc:
        raise ConfigError("event", exc.errors()[0]["msg"]) from exc


def _object(path: str, body: bytes) -> dict[str, Any]:
    try:
        value = json.loads(body)
    except ValueError as exc:
        raise ConfigError(path, f"is not JSON: {exc}") from exc
    if not isinstance(value, dict):
        raise ConfigError(path, "must be a JSON object")
    return value


def view(state: triggers.Trigger) -> dict[str, Any]:
    rule = state.rule
    return {
        "trigger": rule.name,
        "on": rule.type,
        "where": rule.where,
        "does": rule.do.kind,
        "policy": rule.policy,
        "fired": state.fired,
        "budget": rule.budget,
        "active": state.active,
        "queued": len(state.queue),
        "rule": rule.model_dump(mode="json"),
        "history": [{**asdict(line), "at": line.at.isoformat(timespec="milliseconds")} for line in state.history],
    }
