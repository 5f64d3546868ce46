"""Everything we use of flwr that is not its public API, and the bridge to our wire format.

Tested with flwr 1.41; `pyproject.toml` pins that minor version. Imported by aggregator and
trainer processes only: an idle agent and the coordinator never load it.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from flwr.app import (
    Array,
    ArrayRecord,
    ConfigRecord,
    Context,
    Error,
    Message,
    Metadata,
    MetricRecord,
    RecordDict,
)
from flwr.app.message.message import make_message
from flwr.common.constant import SUPERLINK_NODE_ID, ErrorCode, SType
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from flwr.proto.recorddict_pb2 import RecordDict as RecordDictProto
from flwr.supercore.object_ref import load_app
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity
from pydantic import ValidationError

from fabric.errors import FedtideError, MalformedMessage
from fabric.tensors import Buffer, Tensor, decode, encode, is_carried
from fabric.wire import Arrays, ConfigValues, Packed, Values, WireError, WireMessage, WireValue

if TYPE_CHECKING:
    from flwr.server import History

__all__ = [
    "SUPERLINK_NODE_ID",
    "AppLoadError",
    "ErrorCode",
    "Run",
    "adopt_identity",
    "array_of",
    "context_of",
    "dump_state",
    "frame_of",
    "framed",
    "from_wire",
    "load_component",
    "load_state",
    "record_of",
    "stamp",
    "tensors_of",
    "to_wire",
    "watch_legacy_runs",
]


class AppLoadError(FedtideError):
    """A Flower app whose component cannot be imported."""

    exit_code = 2


def adopt_identity(run_id: int, node_id: int) -> None:
    """Tell flwr who this process is; without it no Message can be made."""
    TaskIdentity.task_id = 1
    TaskIdentity.run_id = run_id
    TaskIdentity.node_id = node_id


def load_component(reference: str, directory: Path) -> Any:
    """The object an app names as `module:attribute`, imported from its own directory.

    Raises:
        AppLoadError: a module or attribute is missing, or raises at import.
    """
    sys.path.insert(0, str(directory))
    try:
        return load_app(reference, AppLoadError, directory)
    except ModuleNotFoundError as exc:
        raise AppLoadError(
            f"{reference} needs the Python module {exc.name!r}, which is not installed here",
            "Install it beside fedtide on the machines that run this app",
        ) from exc
    except AppLoadError:
        raise
    except Exception as exc:  # an app may raise anything while it is imported
        raise AppLoadError(f"importing {reference} raised {type(exc).__name__}: {exc}") from exc


def context_of(
    run_id: int, node_id: int, node_config: ConfigValues, run_config: ConfigValues, state: RecordDict
) -> Context:
    return Context(
        run_id=run_id, node_id=node_id, node_config=dict(node_config), state=state, run_config=dict(run_config)
    )


def dump_state(state: RecordDict) -> bytes:
    """A context's state as bytes (Flower's own protobuf)."""
    return bytes(recorddict_to_proto(state).SerializeToString(deterministic=True))


def load_state(data: bytes) -> RecordDict:
    return recorddict_from_proto(RecordDictProto.FromString(data))


def tensors_of(record: ArrayRecord) -> list[Tensor]:
    """The arrays of a record without copying them out of their npy shells.

    Arrays of another serialization, or of a dtype that no frame carries, travel as raw bytes.
    """
    return [_tensor(name, array) for name, array in record.items()]


def _opaque(name: str, array: Array) -> Tensor:
    shape = "x".join(map(str, array.shape))
    return Tensor(f"{_OPAQUE}{array.stype}|{array.dtype}|{shape}|{name}", "U8", (len(array.data),), array.data)


def _tensor(name: str, array: Array) -> Tensor:
    if array.stype != SType.NUMPY:
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
    array = tensor.numpy()
    head = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        head, {"descr": np.lib.format.dtype_to_descr(array.dtype), "fortran_order": False, "shape": array.shape}
    )
    data = tensor.data if tensor.dtype != "BF16" else array.tobytes()
    return Array(str(array.dtype), array.shape, SType.NUMPY, b"".join((head.getbuffer(), data)))


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
    text = _values(record).model_dump_json().encode()
    return encode([Tensor(_VALUES, "U8", (len(text),), text)])


def record_of_frame(frame: Buffer) -> ArrayRecord | MetricRecord | ConfigRecord:
    """The inverse of `frame_of`."""
    tensors = decode(frame)
    if [t.name for t in tensors] == [_VALUES]:
        try:
            return _record(Values.model_validate_json(bytes(tensors[0].data)))
        except ValidationError as exc:
            raise MalformedMessage(f"values record does not decode: {exc.errors()[0]['msg']}") from exc
    return record_of(frame)


def record_of(frame: Buffer) -> ArrayRecord:
    """The array record of a tensor frame."""
    tensors = decode(frame)
    return ArrayRecord(
        {t.name.split("|", 4)[-1] if t.name.startswith(_OPAQUE) else t.name: array_of(t) for t in tensors}
    )


def to_wire(message: Message, arrays: Mapping[str, Arrays]) -> WireMessage:
    """A message without its frames; `arrays` says where each record that `framed` names went."""
    meta = message.metadata
    content: dict[str, Arrays | Values] | None = None
    error = None
    if message.has_error():
        error = WireError(code=message.error.code, reason=message.error.reason or "")
    else:
        content = {}
        for name, record in message.content.items():
            if name in arrays:
                content[name] = arrays[name]
            elif not isinstance(record, ArrayRecord):
                content[name] = _values(record)
    return WireMessage(
        run_id=meta.run_id,
        message_id=meta.message_id,
        src_node_id=meta.src_node_id,
        dst_node_id=meta.dst_node_id,
        reply_to_message_id=meta.reply_to_message_id,
        group_id=meta.group_id,
        created_at=meta.created_at,
        ttl=meta.ttl,
        message_type=meta.message_type,
        content=content,
        error=error,
    )


def _values(record: MetricRecord | ConfigRecord) -> Values:
    values: dict[str, WireValue] = {}
    for key, value in record.items():
        if isinstance(value, list):
            values[key] = [Packed.of(v) if isinstance(v, bytes) else v for v in value]
        else:
            values[key] = Packed.of(value) if isinstance(value, bytes) else value
    return Values(kind="metrics" if isinstance(record, MetricRecord) else "config", values=values)


def from_wire(wire: WireMessage, frames: Mapping[str, Buffer]) -> Message:
    """Rebuild a message; `frames` holds the fetched blobs by digest.

    Raises:
        MalformedMessage: a frame or value that does not decode.
    """
    metadata = Metadata(
        run_id=wire.run_id,
        message_id=wire.message_id,
        src_node_id=wire.src_node_id,
        dst_node_id=wire.dst_node_id,
        reply_to_message_id=wire.reply_to_message_id,
        group_id=wire.group_id,
        created_at=wire.created_at,
        ttl=wire.ttl,
        message_type=wire.message_type,
    )
    if wire.error is not None:
        return make_message(metadata, error=Error(wire.error.code, wire.error.reason))
    content = RecordDict()
    for name, part in (wire.content or {}).items():
        if isinstance(part, Arrays):
            frame = frames[part.blob.digest] if part.blob is not None else part.inline or b""
            content[name] = record_of_frame(frame)
        else:
            content[name] = _record(part)
    return make_message(metadata, content=content)


def _record(part: Values) -> MetricRecord | ConfigRecord:
    values: dict[str, Any] = {}
    for key, value in part.values.items():
        if isinstance(value, list):
            values[key] = [v.unpack() if isinstance(v, Packed) else v for v in value]
        else:
            values[key] = value.unpack() if isinstance(value, Packed) else value
    try:
        return MetricRecord(values) if part.kind == "metrics" else ConfigRecord(values)
    except (TypeError, ValueError) as exc:
        raise MalformedMessage(f"{part.kind} record does not decode: {exc}") from exc


def stamp(message: Message, message_id: str) -> Message:
    """Give a message the id by which its reply will name it."""
    message.metadata.__dict__["_message_id"] = message_id
    return message


def watch_legacy_runs(rounds: int | None, ended: Callable[[History, list[Array]], None]) -> None:
    """Let `ended` see the history and final arrays of every legacy (`server_fn`) run of this process.

    Args:
        rounds: replaces the app's own number of rounds, if given.
    """
    import flwr.serverapp.server_app as server_app_module
    from flwr.compat.common.recorddict_compat import parameters_to_arrayrecord
    from flwr.server.server import init_defaults

    original = vars(server_app_module)["start_grid"]

    def start_grid(*, grid: Any, server: Any, config: Any, strategy: Any, client_manager: Any) -> History:
        server, config = init_defaults(server=server, config=config, strategy=strategy, client_manager=client_manager)
        if rounds is not None:
            config.num_rounds = rounds
        history: History = original(grid=grid, server=server, config=config)
        ended(history, list(parameters_to_arrayrecord(server.parameters, keep_input=True).values()))
        return history

    vars(server_app_module)["start_grid"] = start_grid
