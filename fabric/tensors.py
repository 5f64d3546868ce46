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
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fabric.errors import MalformedMessage

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

    def numpy(self) -> npt.NDArray[Any]:
        """A read-only view as numpy; BF16 is widened to float32, which is exact."""
        if self.dtype == "BF16":
            bits = np.frombuffer(self.data, dtype="<u2").astype("<u4") << 16
            return bits.view("<f4").reshape(self.shape)
        return np.frombuffer(self.data, dtype=_NUMPY_OF[self.dtype]).reshape(self.shape)


def encode(tensors: Iterable[Tensor]) -> list[Buffer]:
    """The frame of `tensors` as buffers to be written one after the other; equal input, equal bytes."""
    header: dict[str, object] = {}
    data: list[Buffer] = []
    offset = 0
    for tensor in tensors:
        if tensor.name in header or tensor.name == "__metadata__":
            raise MalformedMessage(f"tensor name {tensor.name!r} stands twice in one frame, or is reserved")
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
    header, start = _header(view)
    tensors: list[Tensor] = []
    expected = 0
    for name, entry in header.items():
        try:
            dtype, shape = str(entry["dtype"]), tuple(int(n) for n in entry["shape"])
            begin, end = (int(n) for n in entry["data_offsets"])
            size = math.prod(shape) * _ITEM_BYTES[dtype]
        except (KeyError, TypeError, ValueError) as exc:
            raise MalformedMessage(f"tensor frame: entry {name!r} is malformed") from exc
        if begin != expected or end - begin != size or min(shape, default=0) < 0 or start + end > len(view):
            raise MalformedMessage(f"tensor frame: {name!r} does not fit its offsets")
        expected = end
        tensors.append(Tensor(name, dtype, shape, view[start + begin : start + end]))
    if start + expected != len(view):
        raise MalformedMessage("tensor frame: trailing bytes")
    return tensors


def _header(view: memoryview) -> tuple[dict[str, dict[str, Sequence[int]]], int]:
    if len(view) < 8:
        raise MalformedMessage("tensor frame: shorter than its own header")
    (length,) = struct.unpack("<Q", view[:8])
    if length > MAX_HEADER_BYTES or 8 + length > len(view):
        raise MalformedMessage("tensor frame: header length is out of range")
    try:
        header = json.loads(bytes(view[8 : 8 + length]))
    except ValueError as exc:
        raise MalformedMessage("tensor frame: header is not JSON") from exc
    if not isinstance(header, dict):
        raise MalformedMessage("tensor frame: header is not an object")
    header.pop("__metadata__", None)
    return header, 8 + length


def frame_size(frame: Sequence[Buffer]) -> int:
    """Bytes of an encoded frame."""
    return sum(len(part) for part in frame)
