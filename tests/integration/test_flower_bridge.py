"""Flower messages survive the wire: every record kind, dtype, error and metadata field."""

from __future__ import annotations

import math

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict

from fedtide.fabric.flower import bridge as flower
from fedtide.fabric.messages.tasks import Arrays, WireMessage
from fedtide.fabric.tensors.frame import decode, encode


@pytest.fixture(autouse=True)
def _identity() -> None:
    flower.adopt_identity(run_id=7, node_id=1)


def _through_json(message: Message) -> Message:
    arrays = {
        name: Arrays(inline=b"".join(encode(flower.tensors_of(record))))
        for name, record in (message.content.items() if message.has_content() else ())
        if isinstance(record, ArrayRecord)
    }
    wire = WireMessage.model_validate_json(flower.to_wire(message, arrays).model_dump_json())
    return flower.from_wire(wire, {})


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "int64", "uint8", "bool"])
@pytest.mark.parametrize("shape", [(), (0, 3), (2, 3)])
def test_an_array_comes_back_as_the_very_same_bytes(dtype: str, shape: tuple[int, ...]) -> None:
    array = Array(np.ones(shape, dtype))
    message = Message(RecordDict({"arrays": ArrayRecord({"a": array})}), 5, "train")
    back = _through_json(message).content["arrays"]["a"]
    assert (back.dtype, back.shape, back.stype, back.data) == (array.dtype, array.shape, array.stype, array.data)


def test_a_fortran_ordered_array_keeps_its_values() -> None:
    values = np.asfortranarray(np.arange(6.0).reshape(2, 3))
    message = Message(RecordDict({"arrays": ArrayRecord({"a": Array(values)})}), 5, "train")
    assert np.array_equal(_through_json(message).content["arrays"]["a"].numpy(), values)


def test_an_array_of_a_foreign_serialization_passes_untouched() -> None:
    opaque = Array("float32", (2, 2), "my.format", b"\x00opaque|bytes")
    message = Message(RecordDict({"arrays": ArrayRecord({"name|with|bars": opaque})}), 5, "train")
    back = _through_json(message).content["arrays"]["name|with|bars"]
    assert (back.dtype, back.shape, back.stype, back.data) == ("float32", (2, 2), "my.format", opaque.data)


def test_values_keep_their_types_and_order() -> None:
    metrics = {"z": 1, "a": 1.0, "list": [1.5, 2.5], "nan": math.nan, "inf": math.inf, "big": 2**63 - 1}
    config = {"flag": True, "raw": b"\x00\xff", "text": "ä", "raws": [b"a", b""], "flags": [True, False], "empty": []}
    content = RecordDict({"m": MetricRecord(metrics), "c": ConfigRecord(config)})
    back = _through_json(Message(content, 5, "query.thing")).content
    assert list(back["m"]) == list(metrics)
    assert {k: type(v) for k, v in back["m"].items()} == {k: type(v) for k, v in metrics.items()}
    assert math.isnan(back["m"]["nan"])
    assert back["m"]["big"] == 2**63 - 1
    assert dict(back["c"]) == config
    assert type(back["c"]["flag"]) is bool


def test_metadata_and_errors_come_back() -> None:
    asked = flower.stamp(Message(RecordDict(), 5, "train", ttl=60, group_id="3"), "task-1")
    reply = Message(Error(2, "broken"), reply_to=_through_json(asked))
    back = _through_json(reply)
    assert (back.error.code, back.error.reason) == (2, "broken")
    assert back.metadata.reply_to_message_id == "task-1"
    assert (back.metadata.run_id, back.metadata.group_id, back.metadata.message_type) == (7, "3", "train")
    assert (back.metadata.src_node_id, back.metadata.dst_node_id) == (5, 1)


def test_a_context_state_is_kept_exactly() -> None:
    state = RecordDict({"c": ConfigRecord({"n": 3}), "a": ArrayRecord({"w": Array(np.ones(3, np.float32))})})
    back = flower.load_state(flower.dump_state(state))
    assert back["c"] == state["c"]
    assert back["a"]["w"].data == state["a"]["w"].data


def test_npy_shells_are_taken_off_without_copying_the_numbers() -> None:
    array = Array(np.arange(1000, dtype=np.float32))
    (tensor,) = flower.tensors_of(ArrayRecord({"a": array}))
    assert np.shares_memory(np.frombuffer(tensor.data, np.uint8), np.frombuffer(array.data, np.uint8))
    assert decode(b"".join(encode([tensor])))[0].numpy().tolist() == list(range(1000))
