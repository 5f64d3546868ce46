"""TriggerRule: a rule of the coordinator, which fires until it is removed."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

import kopf

from fedtide.console import endpoints
from fedtide.console.client import ApiError, Client
from fedtide.console.operator import resources
from fedtide.console.operator.calls import apply, call, generation
from fedtide.console.operator.following import Following, Seen
from fedtide.console.operator.resources import GROUP, TRIGGERS, VERSION
from fedtide.fabric.messages.views import TriggerView

log = logging.getLogger(__name__)


def register(registry: kopf.OperatorRegistry, client: Client, following: Following) -> None:
    """Add the handlers of this kind."""

    @kopf.on.create(GROUP, VERSION, TRIGGERS, registry=registry)
    @kopf.on.update(GROUP, VERSION, TRIGGERS, field="spec", registry=registry)
    def put(name: str, spec: kopf.Spec, status: kopf.Status, patch: kopf.Patch, meta: kopf.Meta, **_: Any) -> None:
        def asked() -> TriggerView:
            return client.send(endpoints.apply_trigger(resources.rule_request(name, spec)))

        if apply(asked, resources.rule_status, patch, meta):
            patch.status["inForce"] = generation(meta)
        elif before := _in_force(status):
            patch.status["inForce"] = before
            patch.status["message"] += f" (the rule of generation {before} is still in force)"

    @kopf.daemon(GROUP, VERSION, TRIGGERS, registry=registry, when=_is_in_force, cancellation_timeout=1.0)
    async def follow(name: str, body: kopf.Body, **_: Any) -> None:
        async def look(now: Mapping[str, Any]) -> Seen:
            view = await following.ask(endpoints.trigger(name))
            shown = resources.rule_in_force(view, now, _in_force(now))
            return shown, frozenset({name, view.active or name})

        await following.follow(TRIGGERS, body, look)

    @kopf.on.delete(GROUP, VERSION, TRIGGERS, registry=registry, when=_may_be_in_force)
    def remove(name: str, status: kopf.Status, **_: Any) -> None:
        if _in_force(status):
            remove_rule(client, name)


def remove_rule(client: Client, name: str) -> None:
    """Take a rule back; one that is gone already is fine."""

    def remove() -> None:
        try:
            client.send(endpoints.remove_trigger(name))
        except ApiError as exc:
            if exc.status != HTTPStatus.NOT_FOUND:
                raise
            log.info("rule.gone_already", extra={"rule": name})

    call(remove)


def _is_in_force(status: kopf.Status, **_: Any) -> bool:
    return _in_force(status) > 0


def _may_be_in_force(status: kopf.Status, **_: Any) -> bool:
    return _in_force(status) > 0 or status.get("phase") != "Refused"


def _in_force(status: Mapping[str, Any]) -> int:
    """Of which generation a rule is in force; 0: none. Status of an older operator has its phase only."""
    applied = int(status.get("observedGeneration") or 0) if status.get("phase") == "Applied" else 0
    return int(status.get("inForce") or applied)
