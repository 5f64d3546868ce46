"""Tokens of programs that use the API. They hold no secret. Pure data."""

from __future__ import annotations

from datetime import datetime
from typing import Literal

from pydantic import Field

from fedtide.fabric.messages.people import Role
from fedtide.fabric.strict import TaggedMessage


class ServiceTokenCreated(TaggedMessage):
    """`digest`: SHA-256 of the token, hexadecimal."""

    kind: Literal["people.token_created"] = "people.token_created"
    id: str = Field(pattern=r"^[a-z0-9]{1,32}$")
    name: str
    digest: str
    role: Role
    expires_at: datetime
    by: str = ""


class ServiceTokenRevoked(TaggedMessage):
    kind: Literal["people.token_revoked"] = "people.token_revoked"
    id: str


PeopleEvent = ServiceTokenCreated | ServiceTokenRevoked
