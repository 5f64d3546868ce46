"""Old and new versions understand each other: what was written by each is read here, and what will be written too.

`corpus/<version>` holds events and messages as that version wrote them, and its snapshot. Files of released versions
are never changed; those of the coming one are written anew by `python -m tests.compat.write`.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, TypeAdapter

from fedtide.coordinator.log import snapshot_codec
from fedtide.coordinator.rollouts import gates, waves
from fedtide.coordinator.runs import selection
from fedtide.coordinator.state import World
from fedtide.fabric.encoding import from_json, one_of_from_json, to_json
from fedtide.fabric.errors import MalformedMessage
from fedtide.fabric.events.envelope import Event, UnknownEvent, decode_event
from fedtide.fabric.events.identity import EnrolmentRequest
from fedtide.fabric.messages import protocol
from fedtide.fabric.messages.fold import FoldAnswer, FoldRequest
from fedtide.fabric.messages.heartbeat import Heartbeat
from fedtide.fabric.messages.protocol import ProtocolRange
from fedtide.fabric.messages.run_questions import Cohort, CohortQuestion
from fedtide.fabric.messages.tasks import Order, Reply
from fedtide.fabric.plans.release import ReleaseManifest
from fedtide.fabric.plans.rollout_plan import Desired, MetricGate
from fedtide.fabric.plans.round_policy import TimeIsUp
from tests.scenarios.build import Story, apply, joined, measured, phase, requested, rollout, wave

CORPUS = Path(__file__).parent / "corpus"
VERSIONS = sorted(folder.name for folder in CORPUS.iterdir())
NEWEST = VERSIONS[-1]
KINDS: tuple[type[BaseModel], ...] = (
    *(CohortQuestion, Cohort, FoldRequest, FoldAnswer, Reply, Desired, TimeIsUp),
    *(EnrolmentRequest, ReleaseManifest, Heartbeat),
)
_ORDER: TypeAdapter[Any] = TypeAdapter(Order)


def _lines(version: str, name: str) -> list[str]:
    return (CORPUS / version / name).read_text().splitlines()


def _events(version: str) -> list[Event]:
    return [decode_event(line.encode()) for line in _lines(version, "events.jsonl")]


def _messages(version: str) -> Iterator[tuple[str, str]]:
    for line in _lines(version, "messages.jsonl"):
        message = json.loads(line)
        yield message["kind"], message["json"]


def _read(kind: str, text: str) -> BaseModel:
    if kind in ("Task", "Cancel"):
        order: BaseModel = one_of_from_json(_ORDER, text.encode(), kind)
        return order
    (model,) = [k for k in KINDS if k.__name__ == kind]
    return from_json(model, text, kind)


def _as_text(world: World) -> str:
    """Worlds are compared by their text: a metric that is NaN is not equal to itself. A set has no order."""
    text = snapshot_codec.encode(snapshot_codec.Snapshot(0, 0, world, []))
    return json.dumps(_in_order(json.loads(text)))


def _in_order(value: Any) -> Any:
    match value:
        case dict():
            return {key: _in_order(inner) for key, inner in value.items()}
        case list() if all(isinstance(inner, str) for inner in value):
            return sorted(value)
        case list():
            return [_in_order(inner) for inner in value]
        case _:
            return value


def _from_the_future(value: Any) -> Any:
    """The same as a newer version would write it: every object has a field more."""
    match value:
        case dict():
            free = {"fields", "values", "metrics", "run_config", "labels", "phases", "serving", "faults", "previous"}
            inner = {k: v if k in free else _from_the_future(v) for k, v in value.items()}
            return {**inner, "field_of_a_newer_version": {"a": [1]}} if "kind" in value or "id" in value else inner
        case list():
            return [_from_the_future(v) for v in value]
        case _:
            return value


@pytest.mark.parametrize("version", VERSIONS)
def test_what_a_version_wrote_is_read_and_written_so_that_it_is_read_again(version: str) -> None:
    for kind, text in _messages(version):
        found = _read(kind, text)
        assert _read(kind, to_json(found).decode()) == found
    for event in _events(version):
        again = decode_event(to_json(event))
        assert to_json(again) == to_json(event)


@pytest.mark.parametrize("version", VERSIONS)
def test_the_log_of_every_version_gives_the_same_world(version: str) -> None:
    worlds = []
    for each in (version, NEWEST):
        world = World()
        for event in _events(each):
            apply(world, event)
        worlds.append(_as_text(world))
    assert worlds[0] == worlds[1]


def test_a_snapshot_of_every_format_is_the_world_of_its_log() -> None:
    for version in [v for v in VERSIONS if (CORPUS / v / "snapshot.json").exists()]:
        world = World()
        for event in _events(version):
            apply(world, event)
        stored = snapshot_codec.decode((CORPUS / version / "snapshot.json").read_bytes())
        assert _as_text(stored.world) == _as_text(world)


@pytest.mark.parametrize(("number", "why"), [(snapshot_codec.FORMAT + 1, "newer"), (2, "older")])
def test_a_snapshot_that_cannot_be_read_whole_is_not_read(number: int, why: str) -> None:
    """A newer one holds what this version does not know; one of format 2 has no ledger. The log has it all."""
    body = json.loads((CORPUS / NEWEST / "snapshot.json").read_bytes())
    with pytest.raises(MalformedMessage, match=why):
        snapshot_codec.decode(json.dumps({**body, "format": number}).encode())


def test_a_state_that_changes_needs_a_new_format_of_snapshots() -> None:
    """Added fields with a default are fine; anything else wants FORMAT + 1 and a migration."""
    wanted = json.loads((CORPUS / NEWEST / "states.json").read_text())
    now = fingerprint()
    for name, fields in wanted.items():
        assert name in now, f"{name} is gone: write a migration (coordinator/log/snapshot_codec.py)"
        for field, kind in fields.items():
            assert now[name].get(field) == kind, f"{name}.{field} changed: write a migration"
        for field in now[name].keys() - fields.keys():
            assert now[name][field].endswith("= default"), f"{name}.{field} is new and has no default"


def test_fields_of_a_newer_version_are_ignored() -> None:
    for kind, text in _messages(NEWEST):
        assert _read(kind, json.dumps({**json.loads(text), "field_of_a_newer_version": 1})) == _read(kind, text)
    for line in _lines(NEWEST, "events.jsonl"):
        newer = json.dumps(_from_the_future(json.loads(line)))
        assert to_json(decode_event(newer.encode())) == to_json(decode_event(line.encode()))


def test_a_field_that_must_be_understood_refuses_the_message_by_name() -> None:
    text = dict(_messages(NEWEST))["Desired"]
    known = {**json.loads(text), "must_understand": ["terms.measure", "release"]}
    assert _read("Desired", json.dumps(known))
    for field in ("terms.encrypted", "window"):
        newer = {**json.loads(text), "must_understand": [field]}
        with pytest.raises(MalformedMessage, match=f"{field}.*upgrade"):
            _read("Desired", json.dumps(newer))


def test_defaults_are_not_written() -> None:
    text = to_json(Desired(model="m", counter=1, rollout="r", release=None)).decode()
    assert json.loads(text) == {"model": "m", "counter": 1, "rollout": "r", "release": None}


def test_an_event_of_an_unknown_kind_is_read_and_changes_nothing() -> None:
    raw = json.loads(_lines(NEWEST, "events.jsonl")[0])
    newer = {**raw, "type": "dev.fedtide.node.moved.v1", "data": {"kind": "node.moved", "node": "a", "to": "us"}}
    event = decode_event(json.dumps(newer).encode())
    assert event.data == UnknownEvent(named="node.moved")
    world = World()
    assert apply(world, event) == ()
    assert not world.nodes
    critical = {**newer, "data": {**newer["data"], "must_understand": ["kind"]}}
    with pytest.raises(MalformedMessage, match="must be understood"):
        decode_event(json.dumps(critical).encode())


def test_a_node_that_speaks_another_protocol_is_not_asked_and_its_reason_says_whom_to_upgrade() -> None:
    story = Story()
    story.tell(joined("new", protocol=ProtocolRange(lowest=2, highest=3)), joined("both", protocol={"highest": 9}))
    spec = requested().spec
    reason = selection.why_not(story.world.nodes["new"], spec)
    assert reason is not None
    assert "upgrade this installation" in reason
    assert selection.why_not(story.world.nodes["both"], spec) is None
    assert protocol.common(ProtocolRange(lowest=1, highest=2), ProtocolRange(lowest=2, highest=5)) == 2
    assert "upgrade it" in (protocol.why_not(ProtocolRange(), ProtocolRange(lowest=2, highest=3)) or "")


def test_a_verdict_is_taken_from_the_log_whatever_this_version_would_say(monkeypatch: pytest.MonkeyPatch) -> None:
    story = Story()
    story.tell(joined("a"), joined("b"))
    gate = MetricGate(pass_if="inferences > 5", fail_if="errors > 100")
    story.tell(rollout(wave("eu", "a", "b"), gates=[gate], bake={"seconds": 1.0}, terms={"measure": True}))
    story.tell(phase("a", "confirmed"), measured("a", inferences=10))
    story.ring()
    logged = story.decided
    assert any("pass" in event.decided for event in logged)
    promoted = story.world.rollouts["ro-1"]

    def always_fails(plan: object, wave: object) -> list[object]:
        return [gates.Judgement("metric", "fail", "another version thinks so")]

    monkeypatch.setattr(waves, "judge", always_fails)
    replayed = World()
    for event in logged:
        apply(replayed, event)
    assert replayed.rollouts["ro-1"] == promoted


def fingerprint() -> dict[str, dict[str, str]]:
    """Every state that a snapshot holds, with its fields and their types."""
    found: dict[str, dict[str, str]] = {}
    for kind in snapshot_codec.TABLES.values():
        _note(kind, found)
    return dict(sorted(found.items()))


def _note(kind: Any, found: dict[str, dict[str, str]]) -> None:
    for inner in typing.get_args(kind):
        _note(inner, found)
    if not inspect.isclass(kind) or not dataclasses.is_dataclass(kind):
        return
    name = f"{kind.__module__.rpartition('.')[2]}.{kind.__qualname__}"
    if name in found:
        return
    hints = typing.get_type_hints(kind)
    none = dataclasses.MISSING
    found[name] = {
        f.name: _shown(hints[f.name]) + (" = default" if (f.default, f.default_factory) != (none, none) else "")
        for f in dataclasses.fields(kind)
    }
    for hint in hints.values():
        _note(hint, found)


def _shown(hint: Any) -> str:
    return str(hint).replace("<class '", "").replace("'>", "")
