"""How models travel between processes, and into the log: as JSON that older and newer versions read. Pure.

Writers leave defaults out, so a new field is on the wire only where it is used. Readers ignore fields they do not
know, unless `Message.must_understand` names them.
"""

from __future__ import annotations

from typing import TypeVar

from pydantic import BaseModel, TypeAdapter, ValidationError

from fedtide.fabric.errors import MalformedMessage
from fedtide.fabric.validation import first_problem

T = TypeVar("T")
M = TypeVar("M", bound=BaseModel)


def to_json(model: BaseModel) -> bytes:
    """The JSON of a model, without its defaults."""
    return model.model_dump_json(exclude_defaults=True).encode()


def from_json(kind: type[M], data: bytes | bytearray | memoryview | str, what: str) -> M:
    """Read what `to_json` wrote, here or in another version.

    Args:
        what: names the message in the error.

    Raises:
        MalformedMessage: it does not fit `kind`, or needs something that this version does not know.
    """
    try:
        return kind.model_validate_json(_plain(data), extra="ignore")
    except ValidationError as exc:
        raise MalformedMessage(f"{what}: {first_problem(exc)}") from exc


def one_of_from_json(kinds: TypeAdapter[T], data: bytes | bytearray | memoryview, what: str) -> T:
    """As `from_json`, for a union of models."""
    try:
        return kinds.validate_json(_plain(data), extra="ignore")
    except ValidationError as exc:
        raise MalformedMessage(f"{what}: {first_problem(exc)}") from exc


def _plain(data: bytes | bytearray | memoryview | str) -> bytes | bytearray | str:
    return data.tobytes() if isinstance(data, memoryview) else data
