"""FederatedRun: a run of the coordinator, from its beginning to its end."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import kopf

from fedtide.console import endpoints
from fedtide.console.client import Client
from fedtide.console.operator import resources
from fedtide.console.operator.calls import apply, call, generation
from fedtide.console.operator.following import Following, Seen
from fedtide.console.operator.resources import GROUP, RUNS, VERSION
from fedtide.fabric.messages.views import RUN_ENDED, RunView


def register(registry: kopf.OperatorRegistry, client: Client, following: Following) -> None:
    """Add the handlers of this kind."""

    @kopf.on.create(GROUP, VERSION, RUNS, registry=registry)
    def start(uid: str, spec: kopf.Spec, patch: kopf.Patch, meta: kopf.Meta, **_: Any) -> None:
        def asked() -> RunView:
            return client.send(endpoints.start_run(resources.run_request(spec)), key=uid)

        apply(asked, resources.run_status, patch, meta)

    @kopf.daemon(GROUP, VERSION, RUNS, registry=registry, when=_is_begun, cancellation_timeout=1.0)
    async def follow(body: kopf.Body, **_: Any) -> None:
        async def look(now: Mapping[str, Any]) -> Seen:
            view = await following.ask(endpoints.run(now["run"]))
            return resources.run_status(view, generation(body.metadata)), frozenset({view.run})

        await following.follow(RUNS, body, look)

    @kopf.on.delete(GROUP, VERSION, RUNS, registry=registry, when=resources.is_under_way)
    def end(status: kopf.Status, **_: Any) -> None:
        run = status.get("run")
        if run and call(lambda: client.send(endpoints.act_on_run(run, "cancel"))).state not in RUN_ENDED:
            raise kopf.TemporaryError(f"{run} is still ending", delay=1.0)


def _is_begun(status: kopf.Status, **_: Any) -> bool:
    return bool(status.get("run")) and not resources.has_ended(status)
