"""The tensor frame: named tensors as one safetensors file, written and read without joining.

Layout (https://github.com/huggingface/safetensors#format): u64 little-endian header length,
a JSON header, then the raw little-endian data. `encode` returns buffers, so nothing is copied
into one block; `decode` returns views into what it was given.

Never holds pickles, and never allocates before the header has been checked against the size.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fedtide.fabric.errors import MalformedMessage

MAX_HEADER_BYTES = 16 * 1024 * 1024

_NUMPY_OF: dict[str, np.dtype[Any]] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("i1"),
    "U64": np.dtype("<u8"),
    "U32": np.dtype("<u4"),
    "U16": np.dtype("<u2"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
}
_NAME_OF = {dtype: name for name, dtype in _NUMPY_OF.items()}
_ITEM_BYTES = {name: dtype.itemsize for name, dtype in _NUMPY_OF.items()} | {"BF16": 2}

Buffer = bytes | memoryview


def is_carried(dtype: np.dtype[Any]) -> bool:
    """Whether a frame can hold numpy arrays of this dtype."""
    return dtype.newbyteorder("<") in _NAME_OF


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A tensor without its data; `dtype` is a safetensors name."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def item_bytes(self) -> int:
        return _ITEM_BYTES[self.dtype]

    @property
    def size_bytes(self) -> int:
        return self.elements * self.item_bytes


def numpy_dtype(dtype: str) -> np.dtype[Any]:
    """numpy's dtype for a safetensors name (not BF16)."""
    return _NUMPY_OF[dtype]


def numbers(dtype: str, data: Buffer) -> npt.NDArray[Any]:
    """Raw little-endian elements as a flat read-only view; BF16 is widened to float32, which is exact."""
    if dtype == "BF16":
        bits = np.frombuffer(data, dtype="<u2").astype("<u4") << 16
        return bits.view("<f4")
    return np.frombuffer(data, dtype=_NUMPY_OF[dtype])


@dataclass(frozen=True, slots=True)
class Tensor:
    """One named tensor: row-major little-endian `data`; `dtype` is a safetensors name.

    `BF16` has no numpy dtype of its own: it stays raw here (two bytes an element).
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    data: Buffer

    @classmethod
    def of(cls, name: str, array: npt.NDArray[Any]) -> Tensor:
        """Wrap a numpy array (copied only if it is not contiguous).

        Raises:
            MalformedMessage: a dtype that the frame cannot carry (complex, object, string).
        """
        dtype = _NAME_OF.get(array.dtype.newbyteorder("<"))
        if dtype is None:
            raise MalformedMessage(f"tensor {name!r} has dtype {array.dtype}, which no frame can carry")
        contiguous = np.asarray(array, dtype=_NUMPY_OF[dtype], order="C")
        flat: Any = contiguous.reshape(-1).view(np.uint8)
        return cls(name, dtype, tuple(array.shape), memoryview(flat))

    @property
    def spec(self) -> TensorSpec:
        return TensorSpec(self.name, self.dtype, self.shape)

    def numpy(self) -> npt.NDArray[Any]:
        """A view as numpy; BF16 is widened to float32."""
        return numbers(self.dtype, self.data).reshape(self.shape)


def encode(tensors: Iterable[Tensor]) -> list[Buffer]:
    """The frame of `tensors` as buffers to be written one after the other; equal input, equal bytes."""
    header: dict[str, object] = {}
    data: list[Buffer] = []
    offset = 0
    for tensor in tensors:
        if tensor.name in header or tensor.name == "__metadata__":
            raise MalformedMessage(f"tensor name {tensor.name!r} occurs twice in one frame, or is reserved")
        end = offset + len(tensor.data)
        header[tensor.name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [offset, end]}
        if len(tensor.data):
            data.append(tensor.data)
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return [struct.pack("<Q", len(text)) + text, *data]


def decode(frame: Buffer) -> list[Tensor]:
    """The tensors of a frame, in the order they were written, as views into `frame`.

    Raises:
        MalformedMessage: the header lies about offsets, shapes or dtypes.
    """
    view = memoryview(frame)
    start = header_end(view, len(view))
    if len(view) < start:
        raise MalformedMessage("tensor frame: shorter than its own header")
    specs = specs_of(view[8:start], len(view) - start)
    return [Tensor(s.name, s.dtype, s.shape, data) for s, data in _cut(view[start:], specs)]


def _cut(view: memoryview, specs: Iterable[TensorSpec]) -> Iterator[tuple[TensorSpec, memoryview]]:
    for spec in specs:
        yield spec, view[: spec.size_bytes]
        view = view[spec.size_bytes :]


def header_end(begin: Buffer, frame_bytes: int) -> int:
    """Where a frame's data starts, from its first 8 bytes.

    Raises:
        MalformedMessage: the header does not fit into a frame of `frame_bytes`.
    """
    if len(begin) < 8:
        raise MalformedMessage("tensor frame: shorter than its own header")
    (length,) = struct.unpack("<Q", begin[:8])
    if length > MAX_HEADER_BYTES or 8 + length > frame_bytes:
        raise MalformedMessage("tensor frame: header length is out of range")
    return 8 + int(length)


def specs_of(header: Buffer, data_bytes: int) -> list[TensorSpec]:
    """The tensors that a header names, in the order of their data.

    Raises:
        MalformedMessage: it lies about offsets, shapes or dtypes; or they do not fill `data_bytes`.
    """
    specs: list[TensorSpec] = []
    expected = 0
    for name, entry in _entries(header).items():
        try:
            spec = TensorSpec(name, str(entry["dtype"]), tuple(int(n) for n in entry["shape"]))
            begin, end = (int(n) for n in entry["data_offsets"])
            size = spec.size_bytes
        except (KeyError, TypeError, ValueError, OverflowError) as exc:
            raise MalformedMessage(f"tensor frame: entry {name!r} is malformed") from exc
        if begin != expected or end - begin != size or min(spec.shape, default=0) < 0 or end > data_bytes:
            raise MalformedMessage(f"tensor frame: {name!r} does not fit its offsets")
        expected = end
        specs.append(spec)
    if expected != data_bytes:
        raise MalformedMessage("tensor frame: trailing bytes")
    return specs


def _entries(header: Buffer) -> dict[str, dict[str, Sequence[int]]]:
    try:
        entries = json.loads(bytes(header))
    except (ValueError, RecursionError) as exc:
        raise MalformedMessage("tensor frame: header is not JSON") from exc
    if not isinstance(entries, dict):
        raise MalformedMessage("tensor frame: header is not an object")
    entries.pop("__metadata__", None)
    return entries


def frame_size(frame: Sequence[Buffer]) -> int:
    """Bytes of an encoded frame."""
    return sum(len(part) for part in frame)
