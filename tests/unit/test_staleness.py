"""What is left of an update that was trained from an older model."""

from __future__ import annotations

import numpy as np
from flwr.app import Array, ArrayRecord, Message, RecordDict

from fedtide.aggregation.sums.staleness import rebase
from fedtide.fabric.flower import bridge as flower


def _record(**arrays: np.ndarray) -> ArrayRecord:
    return ArrayRecord({name: Array(value) for name, value in arrays.items()})


def test_the_discounted_difference_is_added_to_the_present_model() -> None:
    base = _record(w=np.array([1.0, 2.0], np.float32), s=np.array(1.0), n=np.array([5], np.int64))
    present = _record(w=np.array([10.0, 20.0], np.float32), s=np.array(4.0), n=np.array([6], np.int64))
    update = _record(w=np.array([3.0, 6.0], np.float32), s=np.array(2.0), n=np.array([7], np.int64))
    flower.adopt_identity(1, 2)
    message = Message(RecordDict({"arrays": update}), 1, "train")
    rebase(message, base, present, 0.5)
    moved = message.content.array_records["arrays"]
    np.testing.assert_array_equal(moved["w"].numpy(), np.array([11.0, 22.0], np.float32))
    assert moved["w"].numpy().dtype == np.float32
    assert float(moved["s"].numpy()) == 4.5
    np.testing.assert_array_equal(moved["n"].numpy(), [7])
