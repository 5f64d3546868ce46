"""What a node may send to do harm: it is refused, counted, and neither ends the run nor stays in the model."""

from __future__ import annotations

import json
import struct
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, MetricRecord

from fedtide.aggregation import strategies as ours
from fedtide.aggregation.folding.ingest import RefusedUpdate
from fedtide.aggregation.sums.agreement import Agreement
from fedtide.aggregation.sums.round_sum import RoundSum, Weight
from fedtide.fabric.errors import ConfigError, FedtideError, MalformedMessage
from fedtide.fabric.flower import bridge as flower
from fedtide.fabric.messages.tasks import Arrays, Packed, Values, WireMessage
from fedtide.fabric.tensors.codecs import decode
from fedtide.fabric.tensors.frame import Tensor, encode
from fedtide.fabric.tensors.frame import decode as unframe
from tests.unit.test_ingest import SIZE, Setting, _draw
from tests.unit.test_strategies import Case, _messages, _minimal

IDS: dict[str, Any] = {"run_id": 1, "message_id": "", "src_node_id": 1, "dst_node_id": 2, "created_at": 0, "ttl": 1}


@pytest.fixture(autouse=True)
def _a_process_of_flower() -> None:
    flower.adopt_identity(1, flower.SUPERLINK_NODE_ID)


def _round(strategy: Any, updates: list[np.ndarray], base: np.ndarray, **metrics: Any) -> np.ndarray:
    case = Case(0)
    case.base, case.updates = {"w": base}, [{"w": u} for u in updates]
    case.weights = [1] * len(updates)
    answers = case.replies(_messages(strategy, case))
    for key, value in metrics.items():
        answers[-1].content["metrics"][key] = value
    for answer in answers:
        strategy.admit(answer)
    arrays, _ = strategy.aggregate_train(1, answers)
    return arrays["w"].numpy()


def _frame(header: bytes, data: bytes = b"") -> bytes:
    return struct.pack("<Q", len(header)) + header + data


@pytest.mark.parametrize(
    "header",
    [
        b'{"w":{"dtype":"F32","shape":[Infinity],"data_offsets":[0,4]}}',
        b"[" * 100_000,
        b'{"w":{"dtype":"F32","shape":[1e400],"data_offsets":[0,4]}}',
        json.dumps({"w": {"dtype": "F32", "shape": [10**30], "data_offsets": [0, 4]}}).encode(),
    ],
    ids=["infinite", "deep", "float", "huge"],
)
def test_a_header_that_lies_is_malformed_whatever_it_says(header: bytes) -> None:
    with pytest.raises(MalformedMessage):
        unframe(_frame(header, bytes(4)))


@pytest.mark.parametrize("codec", ["int8", "int4+hadamard", "topk:0.5", "bf16"])
@pytest.mark.parametrize("dims", ["1" + "0" * 30, str(2**42), "65536x65536"])
def test_a_coded_tensor_claims_no_memory(codec: str, dims: str) -> None:
    base = {"w": Tensor.of("w", np.zeros(4000, "f4"))}
    with pytest.raises(MalformedMessage, match="another shape"):
        decode(Tensor(f"\x02{codec}|1.2|F32|{dims}|w", "U8", (8,), bytes(8)), base)


def test_values_that_do_not_decode_make_their_message_malformed() -> None:
    content = {"m": Values(kind="metrics", values={"x": Packed(base64="%%%")})}
    with pytest.raises(MalformedMessage):
        flower.from_wire(WireMessage(**IDS, message_type="train", content=content), {})
    content = {"a": Arrays(inline=_frame(b'{"\\u0002int8|x": 3}'), coded=True)}
    with pytest.raises(MalformedMessage):
        flower.from_wire(WireMessage(**IDS, message_type="train", content=content), {})


@pytest.mark.parametrize("metrics", [{"num-examples": 10**400}, {"num-examples": 1, "num-steps": 10**400}])
def test_a_weight_beyond_all_numbers_is_refused(metrics: dict[str, int]) -> None:
    record = MetricRecord({"num-steps": 1, **metrics})
    assert ours.FedNova().weight_of(record).category == "bad_weight"


def test_a_value_that_float32_cannot_hold_does_not_slip_past_the_trimmed_mean() -> None:
    updates = [np.ones(3, "f4")] * 4 + [np.full(3, 2.0**41 + 2**17 - 1)]
    found = _round(ours.StreamingTrimmedMean(num_malicious_nodes=1, **_minimal(5)), updates, np.zeros(3, "f4"))
    np.testing.assert_array_equal(found, 1.0)


@pytest.mark.parametrize("far", [3e300, -3e300])
@pytest.mark.parametrize("kind", ["NormBound", "CentredClipping", "FLTrust"])
def test_an_update_whose_distance_overflows_is_refused(kind: str, far: float, caplog: Any) -> None:
    options: dict[str, Any] = {
        "NormBound": {"bound": 1e3},
        "CentredClipping": {"radius": 1e3},
        "FLTrust": {"own_update": lambda *_: ArrayRecord({"w": Array(np.ones(3, "f4"))})},
    }[kind]
    strategy = getattr(ours, kind)(**options, **_minimal(3))
    found = _round(strategy, [np.ones(3, "f4")] * 2 + [np.array([far, 0, -far])], np.zeros(3, "f4"))
    np.testing.assert_allclose(found, 1.0)
    assert "out_of_range" in caplog.text


@pytest.mark.parametrize("kind", [ours.CoordinateMedian, ours.TrimmedMean, ours.MedianOfMeans, ours.FedAvg])
@pytest.mark.parametrize("dtype", ["f2", "f8"])
def test_no_node_chooses_the_precision_of_the_model(kind: Any, dtype: str) -> None:
    updates = [np.ones(3, dtype), *[np.full(3, 1e5, "f4")] * 2]
    found = _round(kind(**_minimal(3)), updates, np.zeros(3, "f4"))
    assert found.dtype == np.float32
    assert np.isfinite(found).all()


def test_metrics_that_do_not_fit_the_others_are_left_out_and_the_model_is_made() -> None:
    found = _round(ours.FedAvg(**_minimal(2)), [np.ones(3, "f4")] * 2, np.zeros(3, "f4"), loss=[1.0, 2.0])
    np.testing.assert_array_equal(found, 1.0)


def test_a_model_that_cannot_be_averaged_names_its_tensor() -> None:
    with pytest.raises(ConfigError, match="mask"):
        Agreement.of([Tensor.of("mask", np.full(3, -np.inf))], 4)


async def test_a_malformed_frame_is_refused_and_the_next_trial_is_not_held_up(tmp_path: Path) -> None:
    setting = Setting(tmp_path)
    bad = setting.reply("bad", _draw(2))
    (arrays,) = (r for r in (bad.message.content or {}).values() if isinstance(r, Arrays))
    assert arrays.blob is not None
    whole = setting.stored.blobs[arrays.blob.digest]
    setting.stored.blobs[arrays.blob.digest] = whole[:8] + whole[8:].replace(b'"F32"', b'"F99"', 1)
    with pytest.raises(FedtideError, match="tensor frame"):
        await setting.take(bad)
    await setting.take(setting.reply("good", _draw(1)))
    await setting.ingest.settle(setting.sum)
    assert setting.holds_only(_draw(1))


@pytest.mark.parametrize("tensors", [[], [Tensor.of("empty", np.zeros((0, 3)))]], ids=["none", "empty"])
async def test_a_frame_without_the_models_tensors_is_refused(tmp_path: Path, tensors: list[Tensor]) -> None:
    setting = Setting(tmp_path)
    reply = setting.reply("hollow", _draw(1))
    (arrays,) = (r for r in (reply.message.content or {}).values() if isinstance(r, Arrays))
    assert arrays.blob is not None
    frame = b"".join(encode(tensors))
    setting.stored.blobs[arrays.blob.digest] = frame
    shorter = arrays.model_copy(update={"blob": arrays.blob.model_copy(update={"size_bytes": len(frame)})})
    content = {**(reply.message.content or {}), "arrays": shorter}
    message = reply.message.model_copy(update={"content": content})
    with pytest.raises(RefusedUpdate, match=r"'w' is missing|'empty' was not"):
        await setting.take(reply.model_copy(update={"message": message}))
    assert setting.sum.total.terms == 0


def test_whole_updates_and_pieces_may_be_added_at_once_from_two_threads() -> None:
    ones = [Tensor.of("w", np.ones(SIZE, "f4"))]
    frame = memoryview(b"".join(encode(ones)))
    total = RoundSum(Agreement.of(ones, 2048))

    def feed() -> None:
        for number in range(150):
            incoming = total.expect(str(number), Weight(1.0, 1.0), len(frame))
            for low in range(0, len(frame), 65_536):
                incoming.feed(frame[low : low + 65_536])
            incoming.accept()

    thread = threading.Thread(target=feed)
    thread.start()
    for _ in range(150):
        assert total.add([ones], [Weight(1.0, 1.0)]) == [None]
    thread.join()
    (mean,) = total.total.mean()
    assert (mean.numpy() == 1.0).all()
    assert total.total.weight == total.share == 300
