"""Everything we use of flwr that is not its public API, and the bridge to our wire format.

Tested with flwr 1.41 and 1.42 (`make test-flwr`); `pyproject.toml` pins these minor versions. Imported by
aggregator and trainer processes only: an idle agent and the coordinator never load it.
"""

from __future__ import annotations

import functools
import importlib.metadata
import random
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from flwr.app import (
    Array,
    ArrayRecord,
    Context,
    Error,
    Message,
    Metadata,
    RecordDict,
)
from flwr.app.message.message import make_message
from flwr.common.constant import SUPERLINK_NODE_ID, ErrorCode
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from flwr.proto.recorddict_pb2 import RecordDict as RecordDictProto
from flwr.supercore.object_ref import load_app
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity
from google.protobuf.message import DecodeError

from fedtide.fabric.errors import MalformedMessage
from fedtide.fabric.flower.app_errors import told
from fedtide.fabric.flower.app_objects import AppLoadError
from fedtide.fabric.flower.records import (
    CodedArray,
    array_of,
    decoded,
    frame_of,
    framed,
    record_of,
    record_of_frame,
    record_of_values,
    tensors_of,
    values_of,
)
from fedtide.fabric.messages.tasks import Arrays, Values, WireError, WireMessage
from fedtide.fabric.strict import ConfigValues
from fedtide.fabric.tensors.frame import Buffer, decode

if TYPE_CHECKING:
    from flwr.server import History
    from flwr.serverapp import Grid
    from flwr.serverapp.strategy import FedAvg

APP_ERRORS = frozenset({ErrorCode.LOAD_CLIENT_APP_EXCEPTION, ErrorCode.CLIENT_APP_RAISED_EXCEPTION})
"""Codes of errors that are the app's own: another node, or another try, gives the same."""

__all__ = [
    "APP_ERRORS",
    "SUPERLINK_NODE_ID",
    "AppLoadError",
    "CodedArray",
    "ErrorCode",
    "Run",
    "adopt_identity",
    "array_of",
    "context_of",
    "dump_state",
    "frame_of",
    "framed",
    "from_wire",
    "is_flowers_average",
    "load_component",
    "load_state",
    "look_before_average",
    "look_before_check",
    "look_before_sum",
    "record_of",
    "replace_sampling",
    "stamp",
    "tensors_of",
    "to_wire",
    "watch_legacy_runs",
]


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
        raise AppLoadError(*_missing(reference, exc.name or "?")) from exc
    except AppLoadError:
        raise
    except Exception as exc:  # an app may raise anything while it is imported
        raise AppLoadError(f"importing {reference} raised {told(exc, directory)}") from exc


def _missing(reference: str, module: str) -> tuple[str, str]:
    """What is said of a module that an app imports and that is not there, with what to do."""
    if module.partition(".")[0] == "flwr":
        version = importlib.metadata.version("flwr")
        return (
            f"{reference} needs the module {module!r}, which flwr {version} does not have",
            "The app is written for another version of Flower: see Flower's upgrade guides",
        )
    return (
        f"{reference} needs the Python module {module!r}, which is not installed here",
        "Name its package in the app's [project] dependencies, or install it on the machines that run the app; nodes "
        "without torch need the app's training bundle (--train onnx)",
    )


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
    """Raises MalformedMessage: these bytes are no state."""
    try:
        return recorddict_from_proto(RecordDictProto.FromString(data))
    except DecodeError as exc:
        raise MalformedMessage("the state is not in Flower's form") from exc


def to_wire(message: Message, arrays: Mapping[str, Arrays]) -> WireMessage:
    """A message without its frames; `arrays`: where each record that `framed` names is stored."""
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
                content[name] = values_of(record)
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


def from_wire(wire: WireMessage, frames: Mapping[str, Buffer] | None, sent: ArrayRecord | None = None) -> Message:
    """Rebuild a message; `frames` holds the fetched blobs by digest. None: leave records of arrays out.

    Args:
        sent: the arrays to which coded updates are differences.

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
    try:
        return make_message(metadata, content=_content(wire, frames, sent))
    except MalformedMessage:
        raise
    except Exception as exc:  # a node may send anything: that must not end a run
        raise MalformedMessage(f"the message does not decode: {type(exc).__name__}: {exc}") from exc


def _content(wire: WireMessage, frames: Mapping[str, Buffer] | None, sent: ArrayRecord | None) -> RecordDict:
    content = RecordDict()
    for name, part in (wire.content or {}).items():
        if isinstance(part, Arrays):
            if frames is None:
                continue
            frame = frames[part.blob.digest] if part.blob is not None else part.inline or b""
            if part.coded:
                base = decode(frames[part.base.digest]) if part.base is not None else tensors_of(sent or ArrayRecord())
                content[name] = decoded(decode(frame), {t.name: t for t in base})
            else:
                content[name] = record_of_frame(frame)
        else:
            content[name] = record_of_values(part)
    return content


def stamp(message: Message, message_id: str) -> Message:
    """Give a message the id by which its reply will name it."""
    message.metadata.__dict__["_message_id"] = message_id
    return message


def replace_sampling(wait: Callable[[Grid, int], list[int] | None]) -> None:
    """Let `wait` find the nodes that Flower's strategies sample from; it gives None for a grid that is not its own."""
    from flwr.serverapp.strategy import strategy_utils

    original = strategy_utils.sample_nodes

    def sample_nodes(grid: Grid, min_available_nodes: int, sample_size: int) -> tuple[list[int], list[int]]:
        nodes = wait(grid, max(min_available_nodes, sample_size))
        if nodes is None:
            return original(grid, min_available_nodes, sample_size)
        return random.sample(nodes, sample_size), nodes

    _replace_in_strategies(original, sample_nodes)


def _replace_in_strategies(original: Callable[..., Any], other: Callable[..., Any]) -> None:
    """Replace a function in all modules of Flower's strategies: each has imported it by its name."""
    from flwr.serverapp import strategy as package

    name = original.__name__
    for module in vars(package).values():
        if isinstance(module, ModuleType) and vars(module).get(name) is original:
            vars(module)[name] = other


def look_before_check(look: Callable[[FedAvg, list[Message], bool], list[Message]]) -> None:
    """Let `look` see the replies before Flower's strategies check them; what it gives is checked.

    Args:
        look: from (strategy, replies, whether they are of training).
    """
    from flwr.serverapp.strategy import FedAvg

    original = FedAvg._check_and_log_replies

    def check(
        self: FedAvg, replies: Iterable[Message], is_train: bool, validate: bool = True
    ) -> tuple[list[Message], list[Message]]:
        found = list(replies)
        return original(self, look(self, found, is_train) if validate else found, is_train, validate)

    FedAvg._check_and_log_replies = check  # type: ignore[method-assign]


def look_before_average(look: Callable[[list[Message]], list[Message]]) -> None:
    """Let `look` see the updates before a strategy of Flower's averages them; what it gives is averaged.

    Strategies that do something else with arrays are not concerned: boosters have as many bytes as they have.
    """
    from flwr.serverapp import strategy as strategies

    for kind in vars(strategies).values():
        own = vars(kind).get("aggregate_train") if isinstance(kind, type) else None
        if own is not None and kind not in (strategies.FedXgbBagging, strategies.FedXgbCyclic, strategies.Strategy):
            kind.aggregate_train = _looked_at(own, look)


def look_before_sum(look: Callable[[list[RecordDict]], list[RecordDict]]) -> None:
    """Let `look` see the records whose arrays Flower's function averages, whoever calls it: an app's strategy may."""
    from flwr.serverapp.strategy import strategy_utils

    original = strategy_utils.aggregate_arrayrecords

    @functools.wraps(original)
    def aggregate_arrayrecords(records: list[RecordDict], *args: Any, **kwargs: Any) -> ArrayRecord:
        return original(look(list(records)), *args, **kwargs)

    _replace_in_strategies(original, aggregate_arrayrecords)


def _looked_at(original: Callable[..., Any], look: Callable[[list[Message]], list[Message]]) -> Callable[..., Any]:
    @functools.wraps(original)
    def aggregate_train(self: Any, server_round: int, replies: Iterable[Message]) -> Any:
        return original(self, server_round, look(list(replies)))

    return aggregate_train


def is_flowers_average(average: object) -> bool:
    """Whether metrics are averaged by Flower's own function, which needs lists of equal lengths."""
    from flwr.serverapp.strategy.strategy_utils import aggregate_metricrecords

    return average is aggregate_metricrecords


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
