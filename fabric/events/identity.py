"""Events about identities: join tokens, keys of nodes and regions, revocations. They hold no secret. Pure data."""

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
    replaces: bool = Field(default=False, description="Nodes that have credentials may enrol with it too")
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
    """The servers and workers of a region got credentials; the earlier ones are withdrawn."""

    kind: Literal["identity.region_issued"] = "identity.region_issued"
    region: Name
    keys: list[str]


IdentityEvent = JoinTokenCreated | JoinTokenRevoked | NodeEnrolled | NodeRevoked | RegionIssued


class EnrolmentRequest(Message):
    """A new node asks for credentials. The seed that belongs to `key` stays on the node."""

    node: Name
    region: Name
    key: str


class RenewalRequest(Message):
    """A node asks for new credentials before its own expire; the subject names the node."""

    key: str


class CredentialsAnswer(Message):
    """The answer: a JWT for the key that was named, or why there is none."""

    jwt: str = ""
    error: str = ""
    remedy: str = ""
