"""The world as bytes and back: tagged JSON, no pickle. Pure.

A snapshot names the `FORMAT` of its states. `MIGRATIONS` bring an older format up to date, step by step. A snapshot of
a newer format, or one before `OLDEST`, is not read: the log is replayed instead. `tests/compat` holds a snapshot of
every format, and fails if the fields of a state change without a new format.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from decimal import Decimal
from typing import Any, get_args, get_origin

from cattrs.preconf.json import JsonConverter, make_converter
from cattrs.strategies import configure_tagged_union
from immutables import Map
from pydantic import BaseModel

from fedtide.coordinator import state as world
from fedtide.coordinator.fleet import fleet
from fedtide.coordinator.identity import epochs, identities, people, tenants, trust
from fedtide.coordinator.ledger import accounts, budgets
from fedtide.coordinator.models import registry
from fedtide.coordinator.rollouts import rollouts, waves
from fedtide.coordinator.runs import rounds, runs
from fedtide.coordinator.triggers import triggers
from fedtide.fabric.encoding import to_json
from fedtide.fabric.errors import MalformedMessage
from fedtide.fabric.events.envelope import Event, decode_event
from fedtide.fabric.messages.tenants import Quota
from fedtide.fabric.plans.prices import PriceBook
from fedtide.fabric.tensors import blobs

FORMAT = 4
"""The format of the states below. Change it with the first change of a state's fields after a release."""
OLDEST = 3
"""An older snapshot has no ledger, and only the whole log can say what stands in it."""
MIGRATIONS: Mapping[int, Callable[[dict[str, Any]], dict[str, Any]]] = {
    3: lambda tables: {**tables, "free": {}, "trust": {}, "people": {}, "tenants": {}, "quota": {"bytes": None}},
}
"""For each format, a function that turns its tables into those of the next format."""

TABLES: dict[str, Any] = {
    "nodes": dict[str, fleet.Node],
    "runs": dict[str, runs.Run],
    "models": dict[str, registry.Model],
    "rollouts": dict[str, rollouts.Rollout],
    "triggers": dict[str, triggers.Trigger],
    "serving": dict[str, dict[str, blobs.BlobRef]],
    "last_asked": dict[str, datetime],
    "identities": identities.Identities,
    "epoch": epochs.Epoch,
    "trust": trust.Trust,
    "people": people.People,
    "tenants": dict[str, tenants.Tenant],
    "quota": Quota,
    "ledger": dict[str, accounts.Account],
    "budgets": dict[str, budgets.Kept],
    "prices": PriceBook,
    "hourly": dict[str, Map[int, Decimal]],
    "free": dict[str, Map[int, float]],
    "hour": int,
    "metered": str,
}


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The world after the event at `sequence`; `seen` are the ids of events that are not applied again."""

    sequence: int
    applied: int
    world: world.World
    seen: list[str]
    at: datetime | None = None
    """When its last event was logged."""
    left_out: list[tuple[Event, str]] = field(default_factory=list)
    """Events before it that no version has applied since, with the reason."""


def encode(snapshot: Snapshot) -> bytes:
    tables = {name: _CONVERTER.unstructure(getattr(snapshot.world, name), kind) for name, kind in TABLES.items()}
    body = {
        "format": FORMAT,
        "sequence": snapshot.sequence,
        "applied": snapshot.applied,
        "seen": snapshot.seen,
        "at": snapshot.at.isoformat() if snapshot.at is not None else None,
        "left_out": [[to_json(event).decode(), reason] for event, reason in snapshot.left_out],
        "world": tables,
    }
    return json.dumps(body, separators=(",", ":")).encode()


def decode(data: bytes) -> Snapshot:
    """Raises MalformedMessage if `data` is no snapshot, or one of a newer format."""
    found = world.World()
    try:
        body = json.loads(data)
        tables = _up_to_date(body["format"], body["world"])
        for name, kind in TABLES.items():
            setattr(found, name, _CONVERTER.structure(tables[name], kind))
        found.serving = {model: Map(nodes) for model, nodes in found.serving.items()}
        at = datetime.fromisoformat(body["at"]) if body.get("at") else None
        left_out = [(decode_event(text.encode()), str(reason)) for text, reason in body.get("left_out", ())]
        return Snapshot(body["sequence"], body["applied"], found, body["seen"], at, left_out)
    except (KeyError, TypeError, ValueError, ArithmeticError, AttributeError, RecursionError, ExceptionGroup) as exc:
        raise MalformedMessage(f"snapshot: {exc}") from exc


def _up_to_date(number: int, tables: dict[str, Any]) -> dict[str, Any]:
    if number > FORMAT:
        raise MalformedMessage(f"snapshot: its format {number} is newer than {FORMAT}")
    if number < OLDEST:
        raise MalformedMessage(f"snapshot: its format {number} is older than {OLDEST}")
    for step in range(number, FORMAT):
        tables = MIGRATIONS[step](tables)
    return tables


def _converter() -> JsonConverter:
    converter = make_converter()
    converter.register_unstructure_hook_func(
        _is_model, lambda value: value.model_dump(mode="json", exclude_defaults=True)
    )
    converter.register_structure_hook_func(_is_model, lambda value, kind: kind.model_validate(value, extra="ignore"))
    converter.register_unstructure_hook_func(_is_map, lambda value: converter.unstructure(dict(value)))
    converter.register_structure_hook_func(_is_map, _map_of)
    converter.register_unstructure_hook(Decimal, str)
    converter.register_structure_hook(Decimal, lambda value, _: Decimal(value))
    for union in (rounds.Round, runs.Run, waves.Wave, rollouts.Rollout):
        configure_tagged_union(union, converter)
    return converter


def _is_map(kind: Any) -> bool:
    return get_origin(kind) is Map


def _map_of(value: Any, kind: Any) -> Map[Any, Any]:
    key, item = get_args(kind)
    return Map({_CONVERTER.structure(k, key): _CONVERTER.structure(v, item) for k, v in value.items()})


def _is_model(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)


_CONVERTER = _converter()
