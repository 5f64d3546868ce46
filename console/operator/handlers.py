"""Maps custom resources to the coordinator's API, and its views to their status. With kopf.

The coordinator's log is the source of truth. The id of what a resource starts is derived from its uid, so a
restarted operator starts nothing twice. The system also works without custom resources.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any, TypeVar

import kopf

from fedtide.console import endpoints
from fedtide.console.client import ApiError, Client
from fedtide.console.operator import resources
from fedtide.console.operator.resources import GROUP, ROLLOUTS, RUNS, TRIGGERS, VERSION, Object
from fedtide.fabric.errors import ConfigError, TransientError
from fedtide.fabric.messages.requests import RolloutActionName
from fedtide.fabric.messages.views import ROLLOUT_OPEN, RUN_ENDED, RolloutView, RunView, TriggerView

log = logging.getLogger(__name__)

FINALIZER = f"{GROUP}/ends-first"
RETRY_S = 5.0
LOOK_EVERY_S = 3.0
"""Seconds between status updates of a resource that is in progress."""

V = TypeVar("V")


def handlers(client: Client) -> kopf.OperatorRegistry:
    """All handlers, over one client of the coordinator."""
    registry = kopf.OperatorRegistry()
    _logs_in(registry)
    _runs(registry, client)
    _rollouts(registry, client)
    _rules(registry, client)
    return registry


def settings() -> kopf.OperatorSettings:
    chosen = kopf.OperatorSettings()
    chosen.persistence.finalizer = FINALIZER
    chosen.persistence.progress_storage = kopf.AnnotationsProgressStorage(prefix=GROUP)
    chosen.persistence.diffbase_storage = kopf.AnnotationsDiffBaseStorage(prefix=GROUP)
    chosen.posting.enabled = False  # the log has it all, and events would need rights of their own
    # kopf waits so long at its start, too, until it believes that our Role may not list namespaces.
    chosen.networking.error_backoffs = [0.5, 1, 2]
    return chosen


def _logs_in(registry: kopf.OperatorRegistry) -> None:
    @kopf.on.login(registry=registry)
    def login(**kwargs: Any) -> kopf.ConnectionInfo | None:
        """As the pod's service account; outside a cluster as the kubeconfig says."""
        return kopf.login_with_service_account(**kwargs) or kopf.login_with_kubeconfig(**kwargs)


def _runs(registry: kopf.OperatorRegistry, client: Client) -> None:
    @kopf.on.create(GROUP, VERSION, RUNS, registry=registry)
    def start(name: str, uid: str, spec: kopf.Spec, patch: kopf.Patch, meta: kopf.Meta, **_: Any) -> None:
        def asked() -> RunView:
            return client.send(endpoints.start_run(resources.run_request(spec)), key=uid)

        _apply(asked, resources.run_status, patch, meta)

    @kopf.timer(GROUP, VERSION, RUNS, interval=LOOK_EVERY_S, registry=registry, when=_is_under_way)
    def look(status: kopf.Status, patch: kopf.Patch, meta: kopf.Meta, **_: Any) -> None:
        if status.get("run") and not resources.has_ended(status):
            view = _call(lambda: client.send(endpoints.run(status["run"])))
            _show(patch, resources.run_status(view, _generation(meta)), status)

    @kopf.on.delete(GROUP, VERSION, RUNS, registry=registry, when=_is_under_way)
    def end(status: kopf.Status, **_: Any) -> None:
        run = status.get("run")
        if run and _call(lambda: client.send(endpoints.act_on_run(run, "cancel"))).state not in RUN_ENDED:
            raise kopf.TemporaryError(f"{run} is still ending", delay=1.0)


def _rollouts(registry: kopf.OperatorRegistry, client: Client) -> None:
    @kopf.on.create(GROUP, VERSION, ROLLOUTS, registry=registry)
    def start(uid: str, spec: kopf.Spec, patch: kopf.Patch, meta: kopf.Meta, **_: Any) -> None:
        if spec.get("paused"):  # nothing is planned yet: the fleet may be another one when it is let go
            _show(patch, resources.held(_generation(meta)), {})
        else:
            _begin_rollout(client, uid, spec, patch, meta)

    @kopf.timer(GROUP, VERSION, ROLLOUTS, interval=LOOK_EVERY_S, registry=registry, when=_is_under_way)
    def look(status: kopf.Status, patch: kopf.Patch, meta: kopf.Meta, **_: Any) -> None:
        if status.get("rollout") and not resources.has_ended(status):
            view = _call(lambda: client.send(endpoints.rollout(status["rollout"])))
            seen = int(status.get("observedGeneration") or _generation(meta))
            _show(patch, resources.rollout_status(view, seen), status)

    @kopf.on.update(GROUP, VERSION, ROLLOUTS, field="spec", registry=registry)
    def change(**given: Any) -> None:
        _change_rollout(client, **given)

    @kopf.on.delete(GROUP, VERSION, ROLLOUTS, registry=registry, when=_is_under_way)
    def end(status: kopf.Status, **_: Any) -> None:
        key = status.get("rollout")
        if key and _call(lambda: client.send(endpoints.rollout(key))).state in ROLLOUT_OPEN:
            _call(lambda: client.send(endpoints.act_on_rollout(key, "abort", "its resource was deleted")))


def _begin_rollout(client: Client, uid: str, spec: kopf.Spec, patch: kopf.Patch, meta: kopf.Meta) -> None:
    def asked() -> RolloutView:
        return client.send(endpoints.start_rollout(resources.rollout_request(spec)), key=uid)

    patch.status["plan"] = resources.plan_digest(spec)
    _apply(asked, resources.rollout_status, patch, meta)


def _change_rollout(
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
            _begin_rollout(client, uid, spec, patch, meta)
        return
    is_as_planned = status.get("plan") in (None, resources.plan_digest(spec))
    _show(patch, resources.taken_over(status, _generation(meta), is_so=is_as_planned), status)
    if bool((old or {}).get("paused")) != paused:
        action: RolloutActionName = "pause" if paused else "resume"
        _call(lambda: client.send(endpoints.act_on_rollout(key, action, "spec.paused")))


def _rules(registry: kopf.OperatorRegistry, client: Client) -> None:
    @kopf.on.create(GROUP, VERSION, TRIGGERS, registry=registry)
    @kopf.on.update(GROUP, VERSION, TRIGGERS, field="spec", registry=registry)
    def apply(name: str, spec: kopf.Spec, status: kopf.Status, patch: kopf.Patch, meta: kopf.Meta, **_: Any) -> None:
        def asked() -> TriggerView:
            return client.send(endpoints.apply_trigger(resources.rule_request(name, spec)))

        if _apply(asked, resources.rule_status, patch, meta):
            patch.status["inForce"] = _generation(meta)
        elif generation := _in_force(status):
            patch.status["inForce"] = generation
            patch.status["message"] += f" (the rule of generation {generation} is still in force)"

    @kopf.timer(GROUP, VERSION, TRIGGERS, interval=5 * LOOK_EVERY_S, registry=registry, when=_may_be_in_force)
    def look(name: str, status: kopf.Status, patch: kopf.Patch, meta: kopf.Meta, **_: Any) -> None:
        if generation := _in_force(status):
            view = _call(lambda: client.send(endpoints.trigger(name)))
            _show(patch, resources.rule_in_force(view, status, generation), status)

    @kopf.on.delete(GROUP, VERSION, TRIGGERS, registry=registry, when=_may_be_in_force)
    def remove(name: str, status: kopf.Status, **_: Any) -> None:
        if _in_force(status):
            _remove_rule(client, name)


def _remove_rule(client: Client, name: str) -> None:
    try:
        _call(lambda: client.send(endpoints.remove_trigger(name)))
    except kopf.PermanentError as exc:  # it is gone already
        log.info("rule.not_removed", extra={"rule": name, "reason": str(exc)})


def _is_under_way(status: kopf.Status, **_: Any) -> bool:
    """Only then is there something to end before the resource goes: others have no finalizer."""
    return not resources.has_ended(status)


def _may_be_in_force(status: kopf.Status, **_: Any) -> bool:
    return _in_force(status) > 0 or status.get("phase") != "Refused"


def _in_force(status: kopf.Status) -> int:
    """Of which generation a rule is in force; 0: none. Status of an older operator has its phase only."""
    applied = int(status.get("observedGeneration") or 0) if status.get("phase") == "Applied" else 0
    return int(status.get("inForce") or applied)


def _apply(call: Callable[[], V], show: Callable[[V, int], Object], patch: kopf.Patch, meta: kopf.Meta) -> bool:
    """Submit a spec, and write the resulting view or the refusal into the status; returns whether it was taken."""
    try:
        status = show(_call(call), _generation(meta))
    except kopf.PermanentError as exc:
        _show(patch, resources.refused(str(exc), _generation(meta)), {})
        return False
    _show(patch, status, {})
    return True


def _call(call: Callable[[], V]) -> V:
    """An API call, with its errors mapped to kopf's: transient ones are retried."""
    try:
        return call()
    except TransientError as exc:
        raise kopf.TemporaryError(str(exc), delay=RETRY_S) from exc
    except (ApiError, ConfigError) as exc:
        raise kopf.PermanentError(str(exc)) from exc


def _show(patch: kopf.Patch, status: Object, old: Mapping[str, Any]) -> None:
    new = resources.with_times(status, old, datetime.now(UTC))
    if any(old.get(name) != value for name, value in new.items()):
        patch.status.update(new)


def _generation(meta: kopf.Meta) -> int:
    return int(meta.get("generation") or 0)
