"""The tensor frame keeps every dtype and shape, and refuses frames that lie."""

from __future__ import annotations

import json
import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from safetensors.numpy import load as reference_load

from fedtide.fabric.errors import MalformedMessage
from fedtide.fabric.tensors.frame import Tensor, decode, encode, frame_size

DTYPES = [
    "float16",
    "float32",
    "float64",
    "int8",
    "int16",
    "int32",
    "int64",
    "uint8",
    "uint16",
    "uint32",
    "uint64",
    "bool",
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 0, 4), (2, 3, 4)])
def test_every_dtype_and_shape_comes_back_bit_for_bit(dtype: str, shape: tuple[int, ...]) -> None:
    array = np.arange(int(np.prod(shape)), dtype="int64").reshape(shape).astype(dtype)
    (back,) = decode(b"".join(encode([Tensor.of("a", array)])))
    assert back.numpy().dtype == array.dtype
    assert back.shape == shape
    assert back.numpy().tobytes() == array.tobytes()


@given(
    st.dictionaries(
        st.text(min_size=1, max_size=8), hnp.arrays(np.float32, hnp.array_shapes(max_dims=3, max_side=4)), max_size=4
    )
)
def test_a_frame_is_a_safetensors_file(arrays: dict[str, np.ndarray]) -> None:
    arrays.pop("__metadata__", None)
    frame = b"".join(encode([Tensor.of(k, v) for k, v in arrays.items()]))
    reference = reference_load(frame)
    assert {k: v.tobytes() for k, v in reference.items()} == {k: v.tobytes() for k, v in arrays.items()}
    assert [t.name for t in decode(frame)] == list(arrays)


def test_bfloat16_stays_raw_and_widens_exactly() -> None:
    tensor = Tensor("b", "BF16", (2,), struct.pack("<HH", 0x3F80, 0xC000))
    (back,) = decode(b"".join(encode([tensor])))
    assert back.dtype == "BF16"
    assert back.numpy().tolist() == [1.0, -2.0]


def test_big_endian_and_fortran_arrays_are_stored_in_one_form() -> None:
    array = np.asfortranarray(np.arange(6, dtype=">f4").reshape(2, 3))
    (back,) = decode(b"".join(encode([Tensor.of("a", array)])))
    assert back.numpy().tolist() == array.tolist()


def test_a_dtype_that_no_frame_carries_is_refused() -> None:
    with pytest.raises(MalformedMessage, match="complex64"):
        Tensor.of("c", np.zeros(2, np.complex64))


def test_a_name_may_stand_only_once() -> None:
    with pytest.raises(MalformedMessage, match="twice"):
        encode([Tensor.of("a", np.zeros(1)), Tensor.of("a", np.zeros(1))])


def _frame(header: object, data: bytes = b"") -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


@pytest.mark.parametrize(
    "frame",
    [
        b"",
        b"\xff" * 8,
        struct.pack("<Q", 1 << 40),
        _frame([]),
        _frame({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}, b"\0" * 8),
        _frame({"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}, b"\0" * 4),
        _frame({"a": {"dtype": "F31", "shape": [1], "data_offsets": [0, 4]}}, b"\0" * 4),
        _frame({"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}, b"\0" * 8),
        _frame({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, b"\0" * 9),
        _frame({"a": 3}),
    ],
)
def test_a_frame_that_lies_is_refused(frame: bytes) -> None:
    with pytest.raises(MalformedMessage):
        decode(frame)


def test_encoding_copies_no_tensor_data() -> None:
    array = np.arange(1000, dtype=np.float32)
    parts = encode([Tensor.of("a", array)])
    assert np.shares_memory(np.frombuffer(parts[1], np.float32), array)
    assert frame_size(parts) == sum(map(len, parts))
