"""Open Inference Protocol v2: request bodies to arrays, arrays to response bodies. Pure.

JSON and the binary tensor data extension.
https://github.com/kserve/open-inference-protocol/blob/main/specification/protocol/inference_rest.md
https://github.com/triton-inference-server/server/blob/main/docs/protocol/extension_binary_data.md
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fabric.errors import RemoteError

HEADER_LENGTH = "Inference-Header-Content-Length"
"""Of a body with binary tensors: how long its JSON part is."""

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


@dataclass(frozen=True, slots=True)
class InferRequest:
    """`outputs`: the names that are wanted, each with whether as binary; empty: all. `binary`: if not said."""

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


def decode_request(body: bytes | memoryview, json_length: int | None) -> InferRequest:
    """A request body as arrays; those of binary tensors are views of `body`.

    Args:
        json_length: the value of `HEADER_LENGTH`; None: all of it is JSON.

    Raises:
        RemoteError: it is not one; says what is wrong with which input.
    """
    view = memoryview(body)
    if json_length is not None and not 0 <= json_length <= len(view):
        raise RemoteError(f"{HEADER_LENGTH} is {json_length}, the body has {len(view)} bytes")
    head = view if json_length is None else view[:json_length]
    rest = view[len(view) :] if json_length is None else view[json_length:]
    try:
        told = json.loads(bytes(head))
        inputs: dict[str, Array] = {}
        for tensor in told["inputs"]:
            inputs[str(tensor["name"])], rest = _decode_tensor(tensor, rest)
        binary = bool((told.get("parameters") or {}).get("binary_data_output", False))
        outputs = {
            str(o["name"]): bool((o.get("parameters") or {}).get("binary_data", binary))
            for o in told.get("outputs") or []
        }
        identity = str(told.get("id") or "")
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as exc:
        raise RemoteError(f"malformed inference request: {type(exc).__name__}: {exc}") from exc
    if len(rest):
        raise RemoteError(f"{len(rest)} bytes of binary data belong to no input")
    return InferRequest(identity, inputs, outputs, binary)


def _decode_tensor(tensor: Mapping[str, Any], rest: memoryview) -> tuple[Array, memoryview]:
    name, kind = str(tensor["name"]), str(tensor["datatype"])
    dtype = _DTYPES.get(kind)
    if dtype is None:
        raise RemoteError(f"input {name!r}: datatype {kind!r} is not supported", f"Use one of {', '.join(_DTYPES)}")
    shape = tuple(int(n) for n in tensor["shape"])
    if min(shape, default=0) < 0:
        raise RemoteError(f"input {name!r}: shape {list(shape)} has a negative size")
    size = (tensor.get("parameters") or {}).get("binary_data_size")
    if size is None:
        return _from_json(name, tensor["data"], dtype, shape), rest
    size = int(size)
    if not 0 <= size <= len(rest):
        raise RemoteError(f"input {name!r}: {size} bytes of binary data announced, {len(rest)} are left")
    return _from_bytes(name, rest[:size], dtype, shape), rest[size:]


def _from_json(name: str, data: Any, dtype: np.dtype[Any], shape: tuple[int, ...]) -> Array:
    array = np.asarray(data, dtype=dtype)
    if math.prod(shape) != array.size:
        raise RemoteError(f"input {name!r}: {array.size} elements do not fill shape {list(shape)}")
    return array.reshape(shape)


def _from_bytes(name: str, data: memoryview, dtype: np.dtype[Any], shape: tuple[int, ...]) -> Array:
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
        found.append(bytes(data[at - length : at]).decode())
    return found


def encode_response(
    head: dict[str, Any], outputs: Mapping[str, Array], request: InferRequest
) -> tuple[bytes, int | None]:
    """A response body, and the length of its JSON part if binary tensors follow.

    Args:
        head: model name, version and parameters.

    Raises:
        RemoteError: an output is wanted that the model does not have.
    """
    wanted = request.outputs or dict.fromkeys(outputs, request.binary)
    described, parts = [], []
    for name, binary in wanted.items():
        if name not in outputs:
            raise RemoteError(f"the model has no output {name!r}", f"It has {', '.join(outputs)}")
        array = outputs[name]
        tensor: dict[str, Any] = {"name": name, "datatype": datatype(array.dtype), "shape": list(array.shape)}
        if binary:
            parts.append(_to_bytes(array))
            tensor["parameters"] = {"binary_data_size": len(parts[-1])}
        else:
            tensor["data"] = array.reshape(-1).tolist()
        described.append(tensor)
    if request.id:
        head = {**head, "id": request.id}
    text = json.dumps({**head, "outputs": described}).encode()
    return b"".join([text, *parts]), len(text) if parts else None


def _to_bytes(array: Array) -> bytes:
    if array.dtype != np.dtype("object"):
        return array.tobytes()
    encoded = [str(text).encode() for text in array.reshape(-1)]
    return b"".join(struct.pack("<I", len(text)) + text for text in encoded)
