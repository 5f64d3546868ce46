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

    @kopf.timer(GROUP, VERSION, RUNS, interval=LOOK_EVERY_S, registry=registry)
    def look(status: kopf.Status, patch: kopf.Patch, meta: kopf.Meta, **_: Any) -> None:
        if status.get("run") and not resources.has_ended(status):
            view = _call(lambda: client.send(endpoints.run(status["run"])))
            _show(patch, resources.run_status(view, _generation(meta)), status)

    @kopf.on.delete(GROUP, VERSION, RUNS, registry=registry)
    def end(status: kopf.Status, **_: Any) -> None:
        run = status.get("run")
        if run and _call(lambda: client.send(endpoints.act_on_run(run, "cancel"))).state not in RUN_ENDED:
            raise kopf.TemporaryError(f"{run} is still ending", delay=1.0)


def _rollouts(registry: kopf.OperatorRegistry, client: Client) -> None:
    @kopf.on.create(GROUP, VERSION, ROLLOUTS, registry=registry)
    def start(uid: str, spec: kopf.Spec, patch: kopf.Patch, meta: kopf.Meta, **_: Any) -> None:
        def asked() -> RolloutView:
            return client.send(endpoints.start_rollout(resources.rollout_request(spec)), key=uid)

        _apply(asked, resources.rollout_status, patch, meta)

    @kopf.timer(GROUP, VERSION, ROLLOUTS, interval=LOOK_EVERY_S, registry=registry)
    def look(status: kopf.Status, patch: kopf.Patch, meta: kopf.Meta, **_: Any) -> None:
        if status.get("rollout") and not resources.has_ended(status):
            view = _call(lambda: client.send(endpoints.rollout(status["rollout"])))
            _show(patch, resources.rollout_status(view, _generation(meta)), status)

    @kopf.on.update(GROUP, VERSION, ROLLOUTS, field="spec.paused", registry=registry)
    def pause(old: Any, new: Any, status: kopf.Status, **_: Any) -> None:
        key = status.get("rollout")
        if key and bool(old) != bool(new):
            action: RolloutActionName = "pause" if new else "resume"
            _call(lambda: client.send(endpoints.act_on_rollout(key, action, "spec.paused")))

    @kopf.on.delete(GROUP, VERSION, ROLLOUTS, registry=registry)
    def end(status: kopf.Status, **_: Any) -> None:
        key = status.get("rollout")
        if key and _call(lambda: client.send(endpoints.rollout(key))).state in ROLLOUT_OPEN:
            _call(lambda: client.send(endpoints.act_on_rollout(key, "abort", "its resource was deleted")))


def _rules(registry: kopf.OperatorRegistry, client: Client) -> None:
    @kopf.on.create(GROUP, VERSION, TRIGGERS, registry=registry)
    @kopf.on.update(GROUP, VERSION, TRIGGERS, field="spec", registry=registry)
    def apply(name: str, spec: kopf.Spec, patch: kopf.Patch, meta: kopf.Meta, **_: Any) -> None:
        def asked() -> TriggerView:
            return client.send(endpoints.apply_trigger(resources.rule_request(name, spec)))

        _apply(asked, resources.rule_status, patch, meta)

    @kopf.timer(GROUP, VERSION, TRIGGERS, interval=5 * LOOK_EVERY_S, registry=registry)
    def look(name: str, status: kopf.Status, patch: kopf.Patch, meta: kopf.Meta, **_: Any) -> None:
        if status.get("phase") == "Applied":
            view = _call(lambda: client.send(endpoints.trigger(name)))
            _show(patch, resources.rule_status(view, _generation(meta)), status)

    @kopf.on.delete(GROUP, VERSION, TRIGGERS, registry=registry)
    def remove(name: str, status: kopf.Status, **_: Any) -> None:
        if status.get("phase") == "Applied":
            try:
                _call(lambda: client.send(endpoints.remove_trigger(name)))
            except kopf.PermanentError as exc:  # it is gone already
                log.info("rule.not_removed", extra={"rule": name, "reason": str(exc)})


def _apply(call: Callable[[], V], show: Callable[[V, int], Object], patch: kopf.Patch, meta: kopf.Meta) -> None:
    """Submit a spec, and write the resulting view or the refusal into the status."""
    try:
        status = show(_call(call), _generation(meta))
    except kopf.PermanentError as exc:
        status = resources.refused(str(exc), _generation(meta))
    _show(patch, status, {})


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
