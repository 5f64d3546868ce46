"""Whatever bytes come, a decoder gives a value or one of our errors."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter

from fedtide.coordinator.log import snapshot_codec
from fedtide.coordinator.log.reports import why_unbounded
from fedtide.fabric.encoding import from_json, one_of_from_json
from fedtide.fabric.errors import FedtideError
from fedtide.fabric.events.envelope import decode_event
from fedtide.fabric.messages.fold import FoldRequest
from fedtide.fabric.messages.heartbeat import Heartbeat
from fedtide.fabric.messages.run_questions import CohortQuestion
from fedtide.fabric.messages.tasks import Order, Reply
from fedtide.fabric.nats.subjects import parse
from fedtide.fabric.plans.release import decode_release
from fedtide.fabric.plans.rollout_plan import Desired
from fedtide.fabric.tensors import frame
from fedtide.fabric.tensors.blobs import BlobRef, decode_manifest
from tests.hostile import hurt

CORPUS = Path(__file__).parents[1] / "compat" / "corpus"
_ORDER: TypeAdapter[Any] = TypeAdapter(Order)


def _manifest(data: bytes) -> object:
    return decode_manifest(BlobRef(digest=hashlib.sha256(data).hexdigest(), size_bytes=10), data)


def _frame(data: bytes) -> object:
    return frame.decode(len(data).to_bytes(8, "little") + data)


def _event(data: bytes) -> object:
    return why_unbounded(decode_event(data))


DECODERS: dict[str, Callable[[bytes], object]] = {
    "event": _event,
    "order": lambda data: one_of_from_json(_ORDER, data, "order"),
    "reply": lambda data: from_json(Reply, data, "reply"),
    "heartbeat": lambda data: from_json(Heartbeat, data, "heartbeat"),
    "desired": lambda data: from_json(Desired, data, "desired"),
    "cohort question": lambda data: from_json(CohortQuestion, data, "question"),
    "fold request": lambda data: from_json(FoldRequest, data, "request"),
    "release": decode_release,
    "manifest": _manifest,
    "frame": _frame,
    "snapshot": snapshot_codec.decode,
    "subject": lambda data: parse(data.decode("utf-8", "replace")),
}


def _seeds() -> list[bytes]:
    newest = sorted(folder for folder in CORPUS.iterdir())[-1]
    events = (newest / "events.jsonl").read_bytes().splitlines()
    messages = [json.loads(line)["json"].encode() for line in (newest / "messages.jsonl").read_bytes().splitlines()]
    manifest = json.dumps({"size": 10, "chunk": 4, "chunks": ["a" * 64] * 3}).encode()
    header = json.dumps({"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}).encode()
    subjects = [
        b"ft.v1.default.up.eu.n1.rpt.joined",
        b"ft.v1.default.down.node.eu.n1.task.t1",
        b"ft.v1.default.tel.eu.n1",
    ]
    return [*events, *messages, manifest, header, *subjects, (newest / "snapshot.json").read_bytes()[:20_000]]


@pytest.mark.parametrize(
    "rounds", [pytest.param(5, id="few"), pytest.param(1300, id="a million", marks=pytest.mark.slow)]
)
@pytest.mark.timeout(1800)
def test_no_input_makes_a_decoder_raise_anything_else(rounds: int) -> None:
    seeds, rng, tried = _seeds(), random.Random(1), 0
    for _ in range(rounds):
        for seed in seeds:
            data = hurt(seed, rng)
            if rng.random() < 0.3:
                data = hurt(data, rng)
            for name, decode in DECODERS.items():
                tried += 1
                try:
                    decode(data)
                except FedtideError:
                    continue
                except Exception as exc:
                    raise AssertionError(f"{name}: {exc!r} for {data[:300]!r}") from exc
    assert tried == rounds * len(seeds) * len(DECODERS)
