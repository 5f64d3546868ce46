"""Open Inference Protocol v2: request bodies to arrays, arrays to response bodies. Pure.

JSON and the binary tensor data extension.
https://github.com/kserve/open-inference-protocol/blob/main/specification/protocol/inference_rest.md
https://github.com/triton-inference-server/server/blob/main/docs/protocol/extension_binary_data.md
"""

from __future__ import annotations

import itertools
import json
import math
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from fedtide.fabric.errors import RemoteError

HEADER_LENGTH = "Inference-Header-Content-Length"
"""Header of a body with binary tensors: the length of its JSON part in bytes."""

Array = npt.NDArray[Any]

_DTYPES: dict[str, np.dtype[Any]] = {
    "FP32": np.dtype("float32"),
    "FP64": np.dtype("float64"),
    "FP16": np.dtype("float16"),
    "INT64": np.dtype("int64"),
    "INT32": np.dtype("int32"),
    "INT16": np.dtype("int16"),
    "INT8": np.dtype("int8"),
    "UINT64": np.dtype("uint64"),
    "UINT32": np.dtype("uint32"),
    "UINT16": np.dtype("uint16"),
    "UINT8": np.dtype("uint8"),
    "BOOL": np.dtype("bool"),
    "BYTES": np.dtype("object"),
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_IN_JSON: dict[str, set[type]] = {"f": {int, float}, "i": {int}, "u": {int}, "b": {bool}, "O": {str}}
"""What elements are in JSON, by the kind of a dtype."""


@dataclass(frozen=True, slots=True)
class InferRequest:
    """`outputs`: requested outputs, and whether each is binary; empty: all. `binary`: the default for outputs."""

    id: str
    inputs: dict[str, Array]
    outputs: dict[str, bool]
    binary: bool


def datatype(dtype: np.dtype[Any]) -> str:
    """The protocol's name of a dtype; raises RemoteError for one that it does not carry."""
    name = _NAMES.get(dtype)
    if name is None:
        raise RemoteError(f"dtype {dtype} is not carried by the protocol")
    return name


@dataclass(frozen=True, slots=True)
class _Tensor:
    """One input as the JSON describes it; exactly one of `data` and `size_bytes` is set."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    data: Any
    size_bytes: int | None


@dataclass(frozen=True, slots=True)
class _Head:
    id: str
    tensors: tuple[_Tensor, ...]
    outputs: dict[str, bool]
    binary: bool


def decode_request(body: bytes | memoryview, json_length: int | None) -> InferRequest:
    """A request body as arrays; those of binary tensors are views of `body`.

    Args:
        json_length: the value of `HEADER_LENGTH`; None: all of it is JSON.

    Raises:
        RemoteError: the body is invalid; names the input and the problem.
    """
    view = memoryview(body)
    if json_length is None:
        head, rest = _decode_head(bytes(view)), view[len(view) :]
    elif 0 <= json_length <= len(view):
        text = bytes(view[:json_length])
        # A client's requests usually differ only in their binary data.
        head = _known_head(text) if json_length <= MAX_KNOWN_BYTES else _decode_head(text)
        rest = view[json_length:]
    else:
        raise RemoteError(f"{HEADER_LENGTH} is {json_length}, the body has {len(view)} bytes")
    inputs: dict[str, Array] = {}
    for tensor in head.tensors:
        if tensor.size_bytes is None:
            inputs[tensor.name] = tensor.data
            continue
        if tensor.size_bytes > len(rest):
            raise RemoteError(
                f"input {tensor.name!r}: {tensor.size_bytes} bytes of binary data announced, {len(rest)} are left"
            )
        inputs[tensor.name] = _from_bytes(tensor, rest[: tensor.size_bytes])
        rest = rest[tensor.size_bytes :]
    if len(rest):
        raise RemoteError(f"{len(rest)} bytes of binary data belong to no input")
    return InferRequest(head.id, inputs, head.outputs, head.binary)


def _decode_head(text: bytes) -> _Head:
    try:
        body = json.loads(text, parse_constant=_no_number)
        tensors = tuple(_decode_tensor(tensor) for tensor in body["inputs"])
        binary = bool((body.get("parameters") or {}).get("binary_data_output", False))
        outputs = {
            str(o["name"]): bool((o.get("parameters") or {}).get("binary_data", binary))
            for o in body.get("outputs") or []
        }
        id_ = str(body.get("id") or "")
        id_.encode()  # JSON can encode strings that are not valid Unicode
        return _Head(id_, tensors, outputs, binary)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError, RecursionError) as exc:
        raise RemoteError(f"malformed inference request: {type(exc).__name__}: {exc}") from exc


def _no_number(constant: str) -> float:
    raise ValueError(f"{constant} is no number of JSON")


_known_head = lru_cache(maxsize=256)(_decode_head)
MAX_KNOWN_BYTES = 4096


def _decode_tensor(tensor: Mapping[str, Any]) -> _Tensor:
    name, kind = str(tensor["name"]), str(tensor["datatype"])
    dtype = _DTYPES.get(kind)
    if dtype is None:
        raise RemoteError(f"input {name!r}: datatype {kind!r} is not supported", f"Use one of {', '.join(_DTYPES)}")
    shape = tuple(int(n) for n in tensor["shape"])
    if min(shape, default=0) < 0:
        raise RemoteError(f"input {name!r}: shape {list(shape)} has a negative size")
    size = (tensor.get("parameters") or {}).get("binary_data_size")
    if size is None:
        return _Tensor(name, dtype, shape, _from_json(name, tensor["data"], dtype, shape), None)
    if int(size) < 0:
        raise RemoteError(f"input {name!r}: binary_data_size is {size}")
    return _Tensor(name, dtype, shape, None, int(size))


def _from_json(name: str, data: Any, dtype: np.dtype[Any], shape: tuple[int, ...]) -> Array:
    """Checked, not cast: a missing reading (null) is no number, and 1.5 is no INT32."""
    flat = data if isinstance(data, list) else [data]
    while flat and isinstance(flat[0], list):
        flat = list(itertools.chain.from_iterable(flat))
    for kind in {type(each) for each in flat} - _IN_JSON[dtype.kind]:
        wrong = next(each for each in flat if type(each) is kind)
        raise RemoteError(f"input {name!r}: {json.dumps(wrong)[:100]} is no {_NAMES[dtype]}")
    with np.errstate(over="ignore"):  # JSON's numbers are wider than some dtypes: they become infinite there
        array = np.asarray(flat, dtype=dtype)
    if dtype.kind == "f" and not np.isfinite(array).all():
        raise RemoteError(f"input {name!r}: a number is too large for {_NAMES[dtype]}")
    if math.prod(shape) != array.size:
        raise RemoteError(f"input {name!r}: {array.size} elements do not fill shape {list(shape)}")
    return array.reshape(shape)


def _from_bytes(tensor: _Tensor, data: memoryview) -> Array:
    name, dtype, shape = tensor.name, tensor.dtype, tensor.shape
    count = math.prod(shape)
    if dtype == np.dtype("object"):
        texts = _texts(name, data)
        if len(texts) != count:
            raise RemoteError(f"input {name!r}: {len(texts)} elements do not fill shape {list(shape)}")
        return np.array(texts, dtype=object).reshape(shape)
    if count * dtype.itemsize != len(data):
        raise RemoteError(f"input {name!r}: {len(data)} bytes do not fill shape {list(shape)}")
    return np.frombuffer(data, dtype=dtype).reshape(shape)


def _texts(name: str, data: memoryview) -> list[str]:
    found, at = [], 0
    while at < len(data):
        if at + 4 > len(data):
            raise RemoteError(f"input {name!r}: a string's length is cut off")
        (length,) = struct.unpack_from("<I", data, at)
        at += 4 + length
        if at > len(data):
            raise RemoteError(f"input {name!r}: a string is cut off")
        try:
            found.append(bytes(data[at - length : at]).decode())
        except UnicodeDecodeError as exc:
            raise RemoteError(f"input {name!r}: a string is not UTF-8") from exc
    return found


def encode_response(
    answered_by: tuple[str, str, str], outputs: Mapping[str, Array], request: InferRequest
) -> tuple[bytes, int | None]:
    """A response body, and the length of its JSON part if binary tensors follow.

    Args:
        answered_by: name, version and release digest of the model.

    Raises:
        RemoteError: an output is wanted that the model does not have.
    """
    wanted = request.outputs or dict.fromkeys(outputs, request.binary)
    described: list[dict[str, Any]] = []
    binary: list[tuple[str, np.dtype[Any], tuple[int, ...], int]] = []
    parts: list[bytes] = []
    for name, as_binary in wanted.items():
        if name not in outputs:
            raise RemoteError(f"the model has no output {name!r}", f"It has {', '.join(outputs)}")
        array = outputs[name]
        if as_binary:
            parts.append(_to_bytes(array))
            binary.append((name, array.dtype, array.shape, len(parts[-1])))
        else:
            shown = {"name": name, "datatype": datatype(array.dtype), "shape": list(array.shape)}
            described.append({**shown, "data": _to_json(array)})
    if described or request.id:
        text = json.dumps({**_about(answered_by, request.id), "outputs": described + _binary_outputs(binary)}).encode()
    else:
        text = _known_text(answered_by, tuple(binary))
    return b"".join([text, *parts]), len(text) if parts else None


def _about(answered_by: tuple[str, str, str], id_: str) -> dict[str, Any]:
    name, version, digest = answered_by
    about = {"model_name": name, "model_version": version, "parameters": {"release": digest}}
    return {**about, "id": id_} if id_ else about


def _binary_outputs(outputs: Iterable[tuple[str, np.dtype[Any], tuple[int, ...], int]]) -> list[dict[str, Any]]:
    return [
        {"name": n, "datatype": datatype(d), "shape": list(s), "parameters": {"binary_data_size": size}}
        for n, d, s, size in outputs
    ]


@lru_cache(maxsize=256)
def _known_text(
    answered_by: tuple[str, str, str], outputs: tuple[tuple[str, np.dtype[Any], tuple[int, ...], int], ...]
) -> bytes:
    """The JSON part when every tensor is binary: the same for every answer of one release and shape."""
    return json.dumps({**_about(answered_by, ""), "outputs": _binary_outputs(outputs)}).encode()


def _to_json(array: Array) -> list[Any]:
    """Its elements; null for NaN and infinity, which JSON does not have."""
    values: list[Any] = array.reshape(-1).tolist()
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        return [value if math.isfinite(value) else None for value in values]
    return values


def _to_bytes(array: Array) -> bytes:
    if array.dtype != np.dtype("object"):
        return array.tobytes()
    encoded = [str(text).encode() for text in array.reshape(-1)]
    return b"".join(struct.pack("<I", len(text)) + text for text in encoded)
