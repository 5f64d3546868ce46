"""Custom resources to the coordinator's API, and its views back. With kopf.

The coordinator's log stays the truth: a resource starts something under an id that its uid decides, so an
operator that restarts starts nothing twice, and without resources everything works as well.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any

import kopf

from fedtide.console.client import ApiError, Client
from fedtide.console.operator import resources
from fedtide.console.operator.resources import GROUP, ROLLOUTS, RUNS, TRIGGERS, VERSION
from fedtide.fabric import logs
from fedtide.fabric.errors import TransientError

FINALIZER = f"{GROUP}/ends-first"
RETRY_S = 5.0
LOOK_EVERY_S = 3.0
"""How often the view of something that goes on is written into its status."""

Status = Callable[[Mapping[str, Any], int], resources.Object]


def handlers(client: Client) -> kopf.OperatorRegistry:
    """All handlers, over one client of the coordinator."""
    registry = kopf.OperatorRegistry()
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


def _runs(registry: kopf.OperatorRegistry, client: Client) -> None:
    @kopf.on.create(GROUP, VERSION, RUNS, registry=registry)
    def start(name: str, uid: str, spec: kopf.Spec, patch: kopf.Patch, meta: kopf.Meta, **_: Any) -> None:
        body = resources.run_request(name, spec)
        _apply(lambda: client.post("/v1/runs", body, key=uid), resources.run_status, patch, meta)

    @kopf.timer(GROUP, VERSION, RUNS, interval=LOOK_EVERY_S, registry=registry)
    def look(status: kopf.Status, patch: kopf.Patch, meta: kopf.Meta, **_: Any) -> None:
        if status.get("run") and not resources.has_ended(status):
            view = _call(lambda: client.get(f"/v1/runs/{status['run']}"))
            _show(patch, resources.run_status(view, _generation(meta)), status)

    @kopf.on.delete(GROUP, VERSION, RUNS, registry=registry)
    def end(status: kopf.Status, **_: Any) -> None:
        run = status.get("run")
        if run and not resources.run_has_ended(_call(lambda: client.post(f"/v1/runs/{run}/cancel", {}))):
            raise kopf.TemporaryError(f"{run} is still ending", delay=1.0)


def _rollouts(registry: kopf.OperatorRegistry, client: Client) -> None:
    @kopf.on.create(GROUP, VERSION, ROLLOUTS, registry=registry)
    def start(uid: str, spec: kopf.Spec, patch: kopf.Patch, meta: kopf.Meta, **_: Any) -> None:
        body = resources.request({k: v for k, v in spec.items() if k != "paused"})
        _apply(lambda: client.post("/v1/rollouts", body, key=uid), resources.rollout_status, patch, meta)

    @kopf.timer(GROUP, VERSION, ROLLOUTS, interval=LOOK_EVERY_S, registry=registry)
    def look(status: kopf.Status, patch: kopf.Patch, meta: kopf.Meta, **_: Any) -> None:
        if status.get("rollout") and not resources.has_ended(status):
            view = _call(lambda: client.get(f"/v1/rollouts/{status['rollout']}"))
            _show(patch, resources.rollout_status(view, _generation(meta)), status)

    @kopf.on.update(GROUP, VERSION, ROLLOUTS, field="spec.paused", registry=registry)
    def pause(old: Any, new: Any, status: kopf.Status, **_: Any) -> None:
        if status.get("rollout") and bool(old) != bool(new):
            wish = "pause" if new else "resume"
            _call(lambda: client.post(f"/v1/rollouts/{status['rollout']}/{wish}", {"reason": "spec.paused"}))

    @kopf.on.delete(GROUP, VERSION, ROLLOUTS, registry=registry)
    def end(status: kopf.Status, **_: Any) -> None:
        key = status.get("rollout")
        if key and _call(lambda: client.get(f"/v1/rollouts/{key}"))["state"] in resources.OPEN_ROLLOUTS:
            _call(lambda: client.post(f"/v1/rollouts/{key}/abort", {"reason": "its resource was deleted"}))


def _rules(registry: kopf.OperatorRegistry, client: Client) -> None:
    @kopf.on.create(GROUP, VERSION, TRIGGERS, registry=registry)
    @kopf.on.update(GROUP, VERSION, TRIGGERS, field="spec", registry=registry)
    def apply(name: str, spec: kopf.Spec, patch: kopf.Patch, meta: kopf.Meta, **_: Any) -> None:
        body = resources.rule_request(name, spec)
        _apply(lambda: client.put(f"/v1/triggers/{name}", body), resources.rule_status, patch, meta)

    @kopf.timer(GROUP, VERSION, TRIGGERS, interval=5 * LOOK_EVERY_S, registry=registry)
    def look(name: str, status: kopf.Status, patch: kopf.Patch, meta: kopf.Meta, **_: Any) -> None:
        if status.get("phase") == "Applied":
            view = _call(lambda: client.get(f"/v1/triggers/{name}"))
            _show(patch, resources.rule_status(view, _generation(meta)), status)

    @kopf.on.delete(GROUP, VERSION, TRIGGERS, registry=registry)
    def remove(name: str, status: kopf.Status, **_: Any) -> None:
        if status.get("phase") == "Applied":
            _call(lambda: client.call("DELETE", f"/v1/triggers/{name}"), gone_is_fine=True)


def _apply(call: Callable[[], Any], show: Status, patch: kopf.Patch, meta: kopf.Meta) -> None:
    """What the coordinator makes of a spec, or why it does not take it: that stands in the status then."""
    try:
        status = show(_call(call), _generation(meta))
    except kopf.PermanentError as exc:
        status = resources.refused(str(exc), _generation(meta))
    _show(patch, status, {})


def _call(call: Callable[[], Any], *, gone_is_fine: bool = False) -> Any:
    """An API call, with its errors as kopf's: what may work later is tried again."""
    try:
        return call()
    except TransientError as exc:
        raise kopf.TemporaryError(str(exc), delay=RETRY_S) from exc
    except ApiError as exc:
        if gone_is_fine:
            return None
        raise kopf.PermanentError(str(exc)) from exc


def _show(patch: kopf.Patch, status: resources.Object, old: Mapping[str, Any]) -> None:
    new = resources.with_times(status, old, datetime.now(UTC))
    if any(old.get(name) != value for name, value in new.items()):
        patch.status.update(new)


def _generation(meta: kopf.Meta) -> int:
    return int(meta.get("generation") or 0)


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--namespace", required=True, help="Whose resources are acted upon")
    asked = parser.parse_args()
    logs.to_stderr()
    run = kopf.operator(
        registry=handlers(Client.find()),
        settings=settings(),
        namespaces=[asked.namespace],
        standalone=True,
        liveness_endpoint="http://0.0.0.0:8081/healthz",
    )
    asyncio.run(run)
    return 0


if __name__ == "__main__":
    sys.exit(main())
