"""Turns pydantic's errors into ours: the field's path, what is wrong, what to do. Pure."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from fedtide.fabric.errors import ConfigError

M = TypeVar("M", bound=BaseModel)


def first_problem(error: ValidationError) -> str:
    """The first problem as `path: what is wrong`."""
    first = error.errors(include_url=False)[0]
    where = ".".join(map(str, first["loc"]))
    return f"{where}: {_message(first['msg'])}" if where else _message(first["msg"])


def config_error(error: ValidationError, kind: type[BaseModel], within: str = "") -> ConfigError:
    """The first problem of what a person wrote.

    Args:
        kind: the model that it should have been, used to suggest a known field.
        within: where the document stands, before the field's own path.
    """
    first = error.errors(include_url=False)[0]
    field = ".".join(map(str, first["loc"]))
    joint = " " if within.startswith("--") else "."  # an option, and its key
    path = joint.join(part for part in (within, field) if part) or kind.__name__
    if first["type"] == "extra_forbidden":
        known = _fields_at(kind, first["loc"][:-1])
        near = difflib.get_close_matches(str(first["loc"][-1]), known, n=1)
        what = "there is no such field" + (f"; did you mean {near[0]!r}?" if near else "")
        return ConfigError(path, what, f"Known: {', '.join(known)}" if known else "")
    if first["type"] == "union_tag_not_found":
        return ConfigError(path, "does not say its kind", "Write `kind: ...` first")
    return ConfigError(path, _message(first["msg"]))


def checked(kind: type[M], document: object, within: str = "") -> M:
    """`document` as a `kind`; raises ConfigError naming the field that is wrong."""
    try:
        return kind.model_validate(document)
    except ValidationError as exc:
        raise config_error(exc, kind, within) from exc


def _message(text: str) -> str:
    return text.removeprefix("Value error, ")


def _fields_at(kind: type[BaseModel], path: Sequence[int | str]) -> list[str]:
    inner: object = kind
    for part in path:
        if not (isinstance(inner, type) and issubclass(inner, BaseModel)) or part not in inner.model_fields:
            return []
        inner = inner.model_fields[str(part)].annotation
    return list(inner.model_fields) if isinstance(inner, type) and issubclass(inner, BaseModel) else []
