"""FederatedModel: keeps a model's trigger rules in step with its resource, and shows how far its loop is."""

from __future__ import annotations

from collections.abc import Collection
from functools import partial
from typing import Any

import kopf

from fedtide.console import endpoints
from fedtide.console.client import Client
from fedtide.console.operator import federated_model
from fedtide.console.operator.calls import call, generation, write
from fedtide.console.operator.federated_model import ModelSpec
from fedtide.console.operator.following import Following, Seen
from fedtide.console.operator.resources import GROUP, MODELS, VERSION
from fedtide.console.operator.rule_handlers import remove_rule
from fedtide.fabric.errors import ConfigError
from fedtide.fabric.plans.trigger_rule import TriggerRule


def register(registry: kopf.OperatorRegistry, client: Client, following: Following) -> None:
    """Add the handlers of this kind."""

    @kopf.on.create(GROUP, VERSION, MODELS, registry=registry)
    @kopf.on.update(GROUP, VERSION, MODELS, field="spec", registry=registry)
    def put(name: str, uid: str, body: kopf.Body, patch: kopf.Patch, **_: Any) -> None:
        try:
            spec = federated_model.read(name, body.spec)
            _put_rules(client, federated_model.rules(name, spec), list(body.status.get("rules", [])), patch)
            _train_first(client, spec, uid)
        except (ConfigError, kopf.PermanentError) as exc:
            write(patch, federated_model.refused(str(exc), body.status), body.status)
        else:
            write(patch, federated_model.accepted(spec, generation(body.metadata)), body.status)
            following.look_again(spec.model)

    @kopf.daemon(GROUP, VERSION, MODELS, registry=registry, when=_is_in_force, cancellation_timeout=1.0)
    async def follow(body: kopf.Body, **_: Any) -> None:
        async def look() -> Seen:
            model, paused = body.status["model"], bool(body.status.get("paused"))
            progress = await following.ask(endpoints.model_progress(model))
            run = await following.ask_of(progress.run, endpoints.run)
            rollout = await following.ask_of(progress.rollout, endpoints.rollout)
            names = frozenset({model, progress.run, progress.rollout})
            return federated_model.status(paused, progress, run, rollout), names

        await following.follow(MODELS, body, look)

    @kopf.on.delete(GROUP, VERSION, MODELS, registry=registry)
    def remove(status: kopf.Status, **_: Any) -> None:
        for rule in status.get("rules", []):
            remove_rule(client, rule)


def _put_rules(client: Client, rules: list[TriggerRule], before: Collection[str], patch: kopf.Patch) -> None:
    wanted = [rule.name for rule in rules]
    # Before they are there: whatever happens, the resource knows which to remove.
    patch.status["rules"] = sorted({*before, *wanted})
    for rule in rules:
        call(partial(client.send, endpoints.apply_trigger(rule)))
    for gone in set(before) - set(wanted):
        remove_rule(client, gone)
    patch.status["rules"] = wanted


def _train_first(client: Client, spec: ModelSpec, uid: str) -> None:
    run = federated_model.first_run(spec)
    if run is not None:
        progress = call(lambda: client.send(endpoints.model_progress(spec.model)))
        if progress.latest is None and not progress.run:
            call(lambda: client.send(endpoints.start_run(run), key=uid))


def _is_in_force(status: kopf.Status, **_: Any) -> bool:
    return bool(status.get("inForce"))
