"""FederatedModel: keeps a model's trigger rules in step with its resource, and shows how far its loop is."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from functools import partial
from typing import Any

import kopf

from fedtide.console import endpoints
from fedtide.console.client import Client
from fedtide.console.operator import federated_model
from fedtide.console.operator.calls import call, generation, write
from fedtide.console.operator.following import Following, Seen
from fedtide.console.operator.resources import GROUP, MODELS, VERSION
from fedtide.console.operator.rule_handlers import remove_rule
from fedtide.fabric.errors import ConfigError
from fedtide.fabric.plans.run_spec import RunRequest
from fedtide.fabric.plans.trigger_rule import TriggerRule


def register(registry: kopf.OperatorRegistry, client: Client, following: Following) -> None:
    """Add the handlers of this kind."""

    @kopf.on.create(GROUP, VERSION, MODELS, registry=registry)
    @kopf.on.update(GROUP, VERSION, MODELS, field="spec", registry=registry)
    def put(name: str, uid: str, body: kopf.Body, patch: kopf.Patch, **_: Any) -> None:
        seen = generation(body.metadata)
        try:
            spec = federated_model.read(name, body.spec)
            rules, run = federated_model.rules(name, spec), federated_model.first_run(spec)
            _put_rules(client, rules, list(body.status.get("rules", [])), patch)
        except (ConfigError, kopf.PermanentError) as exc:
            write(patch, federated_model.refused(str(exc), body.status), body.status)
            return
        shown = federated_model.accepted(spec, seen)
        shown["refusedRun"] = _train_first(client, spec.model, run, f"{uid}-{seen}")
        write(patch, shown, body.status)
        following.look_again(spec.model)

    @kopf.daemon(GROUP, VERSION, MODELS, registry=registry, when=_is_in_force, cancellation_timeout=1.0)
    async def follow(body: kopf.Body, **_: Any) -> None:
        async def look(now: Mapping[str, Any]) -> Seen:
            model, own = now["model"], set(now.get("rules", []))
            progress = await following.ask(endpoints.model_progress(model))
            run = await following.ask_of(progress.run, endpoints.run)
            rollout = await following.ask_of(progress.rollout, endpoints.rollout)
            rules = [r for r in (await following.ask(endpoints.triggers(limit=1000))).items if r.trigger in own]
            shown = federated_model.status(bool(now.get("paused")), progress, run, rollout, rules)
            if now.get("refusedRun") and not progress.run:
                shown |= {"phase": "TrainingFailed", "message": f"the first run was refused: {now['refusedRun']}"}
            return shown, frozenset({model, progress.run, progress.rollout, *own})

        await following.follow(MODELS, body, look)

    @kopf.on.delete(GROUP, VERSION, MODELS, registry=registry)
    def remove(status: kopf.Status, **_: Any) -> None:
        for rule in status.get("rules", []):
            remove_rule(client, rule)


def _put_rules(client: Client, rules: list[TriggerRule], before: Collection[str], patch: kopf.Patch) -> None:
    """All of them, or none: what was put is taken back if one is refused.

    Raises:
        kopf.PermanentError: one was refused; those before are in force.
    """
    there = {view.trigger: view.rule for view in call(lambda: list(client.every(endpoints.triggers())))}
    wanted = [rule.name for rule in rules]
    # Before they are there: whatever happens, the resource knows which to remove.
    patch.status["rules"] = sorted({*before, *wanted})
    put: list[str] = []
    try:
        for rule in rules:
            call(partial(client.send, endpoints.apply_trigger(rule)))
            put.append(rule.name)
    except kopf.PermanentError:
        for name in put:
            if name in there:
                call(partial(client.send, endpoints.apply_trigger(there[name])))
            else:
                remove_rule(client, name)
        patch.status["rules"] = sorted(before)
        raise
    for gone in set(before) - set(wanted):
        remove_rule(client, gone)
    patch.status["rules"] = wanted


def _train_first(client: Client, model: str, run: RunRequest | None, key: str) -> str:
    """Start the first run of a model that has none, or whose last one failed; returns why that was refused."""
    if run is None:
        return ""
    progress = call(lambda: client.send(endpoints.model_progress(model)))
    last = call(lambda: client.send(endpoints.run(progress.run))) if progress.run else None
    if progress.latest is None and (last is None or last.state in ("failed", "cancelled")):
        try:
            call(lambda: client.send(endpoints.start_run(run), key=key))
        except kopf.PermanentError as exc:
            return str(exc)
    return ""


def _is_in_force(status: kopf.Status, **_: Any) -> bool:
    return bool(status.get("inForce"))
