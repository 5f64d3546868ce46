"""What the log says of identities: join tokens, keys of nodes, which were withdrawn. It holds no secret. Pure data."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Literal

from pydantic import Field

from fedtide.fabric.ids import NAME
from fedtide.fabric.strict import Message, TaggedMessage

Name = Annotated[str, Field(pattern=NAME)]


class JoinTokenCreated(TaggedMessage):
    """`key` is the token's public nkey; `region` empty: any of the installation's."""

    kind: Literal["identity.token_created"] = "identity.token_created"
    token: Name
    key: str
    region: str = ""
    uses: int = Field(ge=1)
    expires_at: datetime
    replaces: bool = Field(default=False, description="Also nodes that have credentials may enrol with it")
    by: str = ""


class JoinTokenRevoked(TaggedMessage):
    kind: Literal["identity.token_revoked"] = "identity.token_revoked"
    token: Name


class NodeEnrolled(TaggedMessage):
    """A node got credentials for `key`: with a token, or (renewed) with those it had."""

    kind: Literal["identity.node_enrolled"] = "identity.node_enrolled"
    node: Name
    region: Name
    key: str
    expires_at: datetime
    token: str = ""


class NodeRevoked(TaggedMessage):
    kind: Literal["identity.node_revoked"] = "identity.node_revoked"
    node: Name
    reason: str = ""


class RegionIssued(TaggedMessage):
    """The servers and workers of a region got credentials; those of before are withdrawn."""

    kind: Literal["identity.region_issued"] = "identity.region_issued"
    region: Name
    keys: list[str]


IdentityEvent = JoinTokenCreated | JoinTokenRevoked | NodeEnrolled | NodeRevoked | RegionIssued


class EnrolmentRequest(Message):
    """A new node's question. It keeps the seed that belongs to `key` to itself."""

    node: Name
    region: Name
    key: str


class RenewalRequest(Message):
    """What a node asks before its credentials expire; who it is stands in the subject."""

    key: str


class CredentialsAnswer(Message):
    """The answer: a JWT for the key that was named, or why there is none."""

    jwt: str = ""
    error: str = ""
    remedy: str = ""
