"""The world as bytes and back: tagged JSON, no pickle. Pure.

A snapshot holds states that the reducers of one version made. `CODE` names that version: bytes of
another are not read, the log is replayed instead.
"""

from __future__ import annotations

import hashlib
import inspect
import json
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from cattrs.preconf.json import JsonConverter, make_converter
from cattrs.strategies import configure_tagged_union
from pydantic import BaseModel

from fedtide.coordinator import conditions
from fedtide.coordinator import state as world
from fedtide.coordinator.fleet import fleet
from fedtide.coordinator.identity import identities
from fedtide.coordinator.models import registry
from fedtide.coordinator.rollouts import catch_up, gates, rollout_steps, rollouts, wave_steps, wave_wishes, waves
from fedtide.coordinator.rollouts import sequential_test as betting_test
from fedtide.coordinator.runs import rounds, runs
from fedtide.coordinator.triggers import signals, triggers
from fedtide.fabric.errors import MalformedMessage
from fedtide.fabric.events import envelope as events
from fedtide.fabric.events import identity as identity_events
from fedtide.fabric.events import rollouts as rollout_events
from fedtide.fabric.events import runs as run_events
from fedtide.fabric.messages import tasks as wire
from fedtide.fabric.plans import release, rollout_plan, round_policy, trigger_rule, windows
from fedtide.fabric.tensors import blobs

_MODULES = (
    *(conditions, fleet, identities, registry, rounds, runs, signals, triggers, world),
    *(betting_test, catch_up, gates, rollout_steps, rollouts, wave_steps, wave_wishes, waves),
    *(
        blobs,
        events,
        identity_events,
        release,
        rollout_events,
        rollout_plan,
        round_policy,
        run_events,
        trigger_rule,
        windows,
        wire,
    ),
)
CODE = hashlib.sha256("".join(inspect.getsource(m) for m in _MODULES).encode()).hexdigest()[:16]

_TABLES: dict[str, Any] = {
    "nodes": dict[str, fleet.Node],
    "runs": dict[str, runs.Run],
    "models": dict[str, registry.Model],
    "rollouts": dict[str, rollouts.Rollout],
    "triggers": dict[str, triggers.Trigger],
    "serving": dict[str, dict[str, blobs.BlobRef]],
    "last_asked": dict[str, datetime],
    "identities": identities.Identities,
}


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The world after the event at `sequence`; `seen` are the ids of events that are not applied again."""

    sequence: int
    applied: int
    world: world.World
    seen: list[str]


def encode(snapshot: Snapshot) -> bytes:
    tables = {name: _CONVERTER.unstructure(getattr(snapshot.world, name), kind) for name, kind in _TABLES.items()}
    body = {"sequence": snapshot.sequence, "applied": snapshot.applied, "seen": snapshot.seen, "world": tables}
    return json.dumps(body, separators=(",", ":")).encode()


def decode(data: bytes) -> Snapshot:
    """Raises MalformedMessage if `data` is no snapshot."""
    found = world.World()
    try:
        body = json.loads(data)
        for name, kind in _TABLES.items():
            setattr(found, name, _CONVERTER.structure(body["world"][name], kind))
        return Snapshot(body["sequence"], body["applied"], found, body["seen"])
    except (KeyError, TypeError, ValueError, ExceptionGroup) as exc:
        raise MalformedMessage(f"snapshot: {exc}") from exc


def _converter() -> JsonConverter:
    converter = make_converter()
    converter.register_unstructure_hook_func(_is_model, lambda value: value.model_dump(mode="json"))
    converter.register_structure_hook_func(_is_model, lambda value, kind: kind.model_validate(value))
    for union in (rounds.Round, runs.Run, waves.Wave, rollouts.Rollout):
        configure_tagged_union(union, converter)
    return converter


def _is_model(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)


_CONVERTER = _converter()
