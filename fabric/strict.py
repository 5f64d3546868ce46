"""The base of all models. Pure.

A model refuses fields that it does not know, so that typos are found. Messages and logged events are read by
`fabric.encoding`, which ignores unknown fields: the writer may be newer.
"""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field, SerializerFunctionWrapHandler, field_validator, model_serializer

Scalar = bool | int | float | str
ConfigValues = dict[str, Scalar]


class Strict(BaseModel):
    """Frozen, and refuses fields it does not know."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        ser_json_bytes="base64",
        val_json_bytes="base64",
        ser_json_inf_nan="constants",
    )


class Request(Strict, allow_inf_nan=False):
    """What a person asks for: every number is finite."""


class Tagged(Strict):
    """One of a union, told apart by its tag. The tag is written even where defaults are left out."""

    TAG: ClassVar[str] = "kind"

    @model_serializer(mode="wrap")
    def _with_tag(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {self.TAG: getattr(self, self.TAG), **handler(self)}


class Message(Strict):
    """Data that one process sends to another, perhaps of another version.

    A reader ignores fields that it does not know, unless the writer names them in `must_understand`: then it refuses
    the message rather than misinterpret it.
    """

    must_understand: tuple[str, ...] = Field(default=(), description="Fields without which it must not be acted upon")

    @field_validator("must_understand")
    @classmethod
    def _all_known(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        unknown = [name for name in names if not _knows(cls, name.split("."))]
        if unknown:
            raise ValueError(f"needs {unknown[0]!r}, which this version does not know: upgrade it")
        return names


class TaggedMessage(Message, Tagged):
    """A message that is one of a union."""


def _knows(kind: type[BaseModel], path: list[str]) -> bool:
    field = kind.model_fields.get(path[0])
    if field is None or len(path) == 1:
        return field is not None
    inner = field.annotation
    return isinstance(inner, type) and issubclass(inner, BaseModel) and _knows(inner, path[1:])
