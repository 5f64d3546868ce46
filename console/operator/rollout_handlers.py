"""ModelRollout: a roll-out of the coordinator; `paused` holds it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import kopf

from fedtide.console import endpoints
from fedtide.console.client import Client
from fedtide.console.operator import resources
from fedtide.console.operator.calls import apply, call, generation, write
from fedtide.console.operator.following import Following, Seen
from fedtide.console.operator.resources import GROUP, ROLLOUTS, VERSION
from fedtide.fabric.messages.requests import RolloutActionName
from fedtide.fabric.messages.views import ROLLOUT_OPEN, RolloutView


def register(registry: kopf.OperatorRegistry, client: Client, following: Following) -> None:
    """Add the handlers of this kind."""

    @kopf.on.create(GROUP, VERSION, ROLLOUTS, registry=registry)
    def start(uid: str, spec: kopf.Spec, patch: kopf.Patch, meta: kopf.Meta, **_: Any) -> None:
        if spec.get("paused"):  # nothing is planned yet: the fleet may be another one when it is let go
            write(patch, resources.held(generation(meta)), {})
        else:
            _begin(client, uid, spec, patch, meta)

    @kopf.daemon(GROUP, VERSION, ROLLOUTS, registry=registry, when=_is_begun, cancellation_timeout=1.0)
    async def follow(body: kopf.Body, **_: Any) -> None:
        async def look(now: Mapping[str, Any]) -> Seen:
            view = await following.ask(endpoints.rollout(now["rollout"]))
            seen = int(now.get("observedGeneration") or generation(body.metadata))
            return resources.rollout_status(view, seen), frozenset({view.rollout})

        await following.follow(ROLLOUTS, body, look)

    @kopf.on.update(GROUP, VERSION, ROLLOUTS, field="spec", registry=registry)
    def change(**given: Any) -> None:
        _change(client, **given)

    @kopf.on.delete(GROUP, VERSION, ROLLOUTS, registry=registry, when=resources.is_under_way)
    def end(status: kopf.Status, **_: Any) -> None:
        key = status.get("rollout")
        if key and call(lambda: client.send(endpoints.rollout(key))).state in ROLLOUT_OPEN:
            call(lambda: client.send(endpoints.act_on_rollout(key, "abort", "its resource was deleted")))


def _is_begun(status: kopf.Status, **_: Any) -> bool:
    return bool(status.get("rollout")) and not resources.has_ended(status)


def _begin(client: Client, uid: str, spec: kopf.Spec, patch: kopf.Patch, meta: kopf.Meta) -> None:
    def asked() -> RolloutView:
        return client.send(endpoints.start_rollout(resources.rollout_request(spec)), key=uid)

    patch.status["plan"] = resources.plan_digest(spec)
    apply(asked, resources.rollout_status, patch, meta)


def _change(
    client: Client,
    *,
    old: Any,
    uid: str,
    spec: kopf.Spec,
    status: kopf.Status,
    patch: kopf.Patch,
    meta: kopf.Meta,
    **_: Any,
) -> None:
    """Only `paused` can be changed; a plan that was begun stays as it is, and the status says so."""
    key, paused = status.get("rollout"), bool(spec.get("paused"))
    if not key:
        if not paused:  # it was held from the beginning, or refused
            _begin(client, uid, spec, patch, meta)
        return
    is_as_planned = status.get("plan") in (None, resources.plan_digest(spec))
    write(patch, resources.taken_over(status, generation(meta), is_so=is_as_planned), status)
    if bool((old or {}).get("paused")) != paused:
        action: RolloutActionName = "pause" if paused else "resume"
        call(lambda: client.send(endpoints.act_on_rollout(key, action, "spec.paused")))
