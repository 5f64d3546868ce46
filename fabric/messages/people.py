"""Who asks, and what stands in the audit trail. Pure data."""

from __future__ import annotations

from datetime import datetime
from typing import Literal

from pydantic import Field

from fedtide.fabric.strict import Message, Request, Strict

Role = Literal["viewer", "operator", "admin"]
ROLES: tuple[Role, ...] = ("viewer", "operator", "admin")
"""viewer: looks. operator: starts and ends runs, roll-outs and rules. admin: also who else may, keys, money."""
LONGEST_TOKEN_S = 366 * 86_400


class PrincipalView(Strict):
    """Who somebody is to the API."""

    name: str
    role: Role
    via: Literal["local token", "service token", "oidc", "nobody asks"]
    expires: datetime | None = Field(default=None, description="When it has to be shown anew; None: never")


class ServiceTokenRequest(Request):
    """A token for a program."""

    name: str = Field(min_length=1, max_length=100, description="What it is for")
    role: Role = "viewer"
    ttl_s: float = Field(default=30 * 86_400.0, gt=0, le=LONGEST_TOKEN_S)


class NewServiceToken(Strict):
    """`token` is shown once."""

    id: str
    token: str


class ServiceTokenView(Strict):
    id: str
    name: str
    role: Role
    state: Literal["good", "expired", "revoked"]
    expires: datetime
    by: str


class LoginView(Strict):
    """Where people log in: an OpenID provider (https://openid.net/specs/openid-connect-core-1_0.html)."""

    issuer: str
    client_id: str
    scopes: list[str]


class AuditEntry(Message):
    """One thing that somebody did, or was refused. `hash` is over all else, with the hash of the entry before.

    Args:
        behalf: for what the caller says that it works: the CLI, a rule, the operator of custom resources, the page.
        origin: the address that it came from.
        asked: what was asked for; secrets are left out, and long bodies named by their digest.
        outcome: the HTTP status; of a rule: `started`, or `failed`.
    """

    number: int = Field(ge=1)
    at: datetime
    who: str = Field(max_length=200)
    role: str = ""
    via: str = ""
    origin: str = ""
    behalf: str = Field(default="", max_length=200)
    action: str = Field(max_length=300)
    asked: str = Field(default="", max_length=4000)
    outcome: str
    reason: str = Field(default="", max_length=1000)
    before: str = Field(description="Hash of the entry before; of the first one it is empty")
    hash: str = ""
