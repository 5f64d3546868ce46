"""Flower's records as tensor frames and values, and back. Public flwr names only."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from pydantic import ValidationError

from fedtide.fabric.errors import MalformedMessage
from fedtide.fabric.messages.tasks import Packed, Values, WireValue
from fedtide.fabric.tensors import codecs
from fedtide.fabric.tensors.frame import Buffer, Tensor, decode, encode, is_carried, numpy_dtype

_NUMPY = "numpy.ndarray"
"""flwr's name for arrays in npy format."""


class FrameArray(Array):
    """An array that still lies in the frame it came in: npy bytes are made only when someone asks for them.

    Its tensor may be a mapped file: an update that is averaged tensor by tensor is never whole in memory.
    """

    def __init__(self, tensor: Tensor) -> None:
        values = tensor.numpy() if tensor.dtype == "BF16" else np.empty(0, numpy_dtype(tensor.dtype))
        self.tensor = tensor
        self.dtype, self.shape, self.stype = str(values.dtype), tensor.shape, _NUMPY

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Array):
            return NotImplemented
        mine = (self.dtype, self.shape, self.stype)
        return mine == (other.dtype, other.shape, other.stype) and self.data == other.data

    __hash__ = None  # type: ignore[assignment]

    @property
    def data(self) -> bytes:  # type: ignore[override]
        """Array in npy format, made anew at each call."""
        return npy(self.tensor)

    def numpy(self) -> npt.NDArray[Any]:
        """A copy that may be written to, as Flower's own gives."""
        return np.array(self.tensor.numpy())


class CodedArray(FrameArray):
    """An array that stays coded in its frame: every access decodes it, so a list of them stays small."""

    def __init__(self, coded: Tensor, base: Mapping[str, Tensor]) -> None:
        spec = codecs.spec_of(coded)
        self._coded, self._base = coded, base
        self.dtype, self.shape, self.stype = str(numpy_dtype(spec.dtype)), spec.shape, _NUMPY

    @property
    def tensor(self) -> Tensor:  # type: ignore[override]
        """Raises MalformedMessage if the data is not what its name says."""
        return codecs.decode(self._coded, self._base)


def decoded(tensors: Iterable[Tensor], base: Mapping[str, Tensor]) -> ArrayRecord:
    """An array record from tensors, of which some may be coded.

    Raises:
        MalformedMessage: a name that cannot be read, or that occurs twice.
    """
    arrays: dict[str, Array] = {}
    for tensor in tensors:
        name = codecs.spec_of(tensor).name
        if name in arrays:
            raise MalformedMessage(f"tensor {name!r} occurs twice in one record")
        arrays[name] = CodedArray(tensor, base) if codecs.is_coded([tensor]) else array_of(tensor)
    return ArrayRecord(arrays)


def npy(tensor: Tensor) -> bytes:
    """A tensor in npy format."""
    array = tensor.numpy()
    head = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        head, {"descr": np.lib.format.dtype_to_descr(array.dtype), "fortran_order": False, "shape": array.shape}
    )
    data = tensor.data if tensor.dtype != "BF16" else array.tobytes()
    return b"".join((head.getbuffer(), data))


def tensors_of(record: ArrayRecord) -> list[Tensor]:
    """The arrays of a record without copying them out of their npy shells.

    Arrays of another serialization, or of a dtype that no frame carries, travel as raw bytes.
    """
    return [_tensor(name, array) for name, array in record.items()]


def _opaque(name: str, array: Array) -> Tensor:
    shape = "x".join(map(str, array.shape))
    return Tensor(f"{_OPAQUE}{array.stype}|{array.dtype}|{shape}|{name}", "U8", (len(array.data),), array.data)


def _tensor(name: str, array: Array) -> Tensor:
    if isinstance(array, FrameArray):
        return replace(array.tensor, name=name)
    if array.stype != _NUMPY:
        return _opaque(name, array)
    view = memoryview(array.data)
    file = io.BytesIO(view[:4096])
    try:
        version = np.lib.format.read_magic(file)
        reader = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape_, fortran, dtype = reader(file)
    except ValueError as exc:
        raise MalformedMessage(f"array {name!r} is not in npy format") from exc
    if not is_carried(dtype):
        return _opaque(name, array)
    if fortran or dtype.byteorder == ">":
        return Tensor.of(name, array.numpy())
    flat = np.frombuffer(view[file.tell() :], dtype=dtype)
    tensor = Tensor.of(name, flat)
    return Tensor(name, tensor.dtype, shape_, tensor.data)


_OPAQUE = "\x01opaque|"
_VALUES = "\x01values"
_LARGE_VALUES_BYTES = 64 * 1024


def array_of(tensor: Tensor) -> Array:
    """The inverse of `tensors_of` for one tensor."""
    if tensor.name.startswith(_OPAQUE):
        stype, dtype, shape, _ = tensor.name.removeprefix(_OPAQUE).split("|", 3)
        dims = tuple(int(n) for n in shape.split("x") if n)
        return Array(dtype, dims, stype, bytes(tensor.data))
    return FrameArray(tensor)


def framed(content: RecordDict) -> list[str]:
    """Names of the records that travel as frames: array records, and values too large for a message."""
    return [name for name, record in content.items() if isinstance(record, ArrayRecord) or _is_large(record)]


def _is_large(record: MetricRecord | ConfigRecord) -> bool:
    def size(value: object) -> int:
        return len(value) if isinstance(value, bytes | str) else 8

    values = (v if isinstance(v, list) else [v] for v in record.values())
    return sum(size(v) for value in values for v in value) > _LARGE_VALUES_BYTES


def frame_of(record: ArrayRecord | MetricRecord | ConfigRecord) -> list[Buffer]:
    """One record as a tensor frame; values become one tensor that holds their JSON."""
    if isinstance(record, ArrayRecord):
        return encode(tensors_of(record))
    text = values_of(record).model_dump_json().encode()
    return encode([Tensor(_VALUES, "U8", (len(text),), text)])


def record_of_frame(frame: Buffer) -> ArrayRecord | MetricRecord | ConfigRecord:
    """The inverse of `frame_of`."""
    tensors = decode(frame)
    if [t.name for t in tensors] == [_VALUES]:
        try:
            return record_of_values(Values.model_validate_json(bytes(tensors[0].data)))
        except ValidationError as exc:
            raise MalformedMessage(f"values record does not decode: {exc.errors()[0]['msg']}") from exc
    return record_of(frame)


def record_of(frame: Buffer) -> ArrayRecord:
    """The array record of a tensor frame."""
    tensors = decode(frame)
    return ArrayRecord(
        {t.name.split("|", 4)[-1] if t.name.startswith(_OPAQUE) else t.name: array_of(t) for t in tensors}
    )


def values_of(record: MetricRecord | ConfigRecord) -> Values:
    """A metric or config record as it travels in a message."""
    values: dict[str, WireValue] = {}
    for key, value in record.items():
        if isinstance(value, list):
            values[key] = [Packed.of(v) if isinstance(v, bytes) else v for v in value]
        else:
            values[key] = Packed.of(value) if isinstance(value, bytes) else value
    return Values(kind="metrics" if isinstance(record, MetricRecord) else "config", values=values)


def record_of_values(part: Values) -> MetricRecord | ConfigRecord:
    """The inverse of `values_of`."""
    values: dict[str, Any] = {}
    try:
        for key, value in part.values.items():
            if isinstance(value, list):
                values[key] = [v.unpack() if isinstance(v, Packed) else v for v in value]
            else:
                values[key] = value.unpack() if isinstance(value, Packed) else value
        return MetricRecord(values) if part.kind == "metrics" else ConfigRecord(values)
    except (TypeError, ValueError) as exc:
        raise MalformedMessage(f"{part.kind} record does not decode: {exc}") from exc
