"""Events about identities: join tokens, keys of nodes and regions, revocations. They hold no secret. Pure data."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Annotated, Literal

from pydantic import Field

from fedtide.fabric.ids import NAME
from fedtide.fabric.messages.trust import RefusalKind, Refused
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
    """A node got credentials for `key`: with a token, or (renewed) with those it had for `renews`."""

    kind: Literal["identity.node_enrolled"] = "identity.node_enrolled"
    node: Name
    region: Name
    key: str
    expires_at: datetime
    token: str = ""
    renews: str = ""
    rejoins: bool = Field(default=False, description="The log was put back, and does not know of `renews`")


class NodeRevoked(TaggedMessage):
    kind: Literal["identity.node_revoked"] = "identity.node_revoked"
    node: Name
    reason: str = ""


class RegionIssued(TaggedMessage):
    """The servers and workers of a region got credentials.

    Those before stay good until the next time, or until they expire; with `rotates` they are withdrawn now.

    Args:
        renews: the key with which its servers asked for them: the credentials of that key are the ones that stay.
    """

    kind: Literal["identity.region_issued"] = "identity.region_issued"
    region: Name
    keys: list[str]
    rotates: bool = True
    expires_at: datetime | None = None
    renews: str = ""


class RegionRemoved(TaggedMessage):
    """A region that is gone for good: its nodes are forgotten, and all its credentials are void."""

    kind: Literal["region.removed"] = "region.removed"
    region: Name


class LogBegun(TaggedMessage):
    """The log has a name from here on."""

    kind: Literal["log.begun"] = "log.begun"
    epoch: str


class LogRestored(TaggedMessage):
    """The log was put back as it was some time ago; it has another name from here on."""

    kind: Literal["log.restored"] = "log.restored"
    epoch: str
    reason: str


class NodeRemoved(TaggedMessage):
    """A node that is gone for good: it is forgotten, and its credentials are void."""

    kind: Literal["node.removed"] = "node.removed"
    node: Name


class TrustPublished(TaggedMessage):
    """Metadata that offline keys have signed: roots after those that are known, and what is delegated to whom."""

    kind: Literal["trust.published"] = "trust.published"
    after: int = Field(default=0, ge=0, description="How many roots were known")
    roots: list[str] = []
    targets: str = ""
    by: str = ""


class TrustVouched(TaggedMessage):
    """An online key says that the metadata are still these."""

    kind: Literal["trust.vouched"] = "trust.vouched"
    version: int = Field(ge=1)
    timestamp: str
    snapshot: str


class OrderRefused(TaggedMessage):
    """A node did not follow what came, because of who had signed it, or because its owner does not allow it."""

    kind: Literal["node.refused"] = "node.refused"
    node: Name
    what: Refused
    refusal: RefusalKind
    about: str = Field(default="", max_length=200, description="A task, model, app, ...")
    reason: str = Field(default="", max_length=1000)


class NodeQuarantined(TaggedMessage):
    """What a node has learned is not wanted: it is asked to train no more until this is taken back."""

    kind: Literal["node.quarantined"] = "node.quarantined"
    node: Name
    reason: str = Field(default="", max_length=1000)
    by: str = ""
    lifted: bool = Field(default=False, description="It may train again")


TrustEvent = TrustPublished | TrustVouched
IdentityEvent = (
    JoinTokenCreated | JoinTokenRevoked | NodeEnrolled | NodeRevoked | RegionIssued | NodeRemoved | RegionRemoved
)


class EnrolmentRequest(Message):
    """A new node asks for credentials. The seed that belongs to `key` stays on the node.

    Args:
        proof: `proof_of` signed with the seed of `key`, base64.
    """

    node: Name
    region: Name
    key: str
    proof: str = ""


class RenewalRequest(Message):
    """A node asks for new credentials before its own expire; the subject names the node.

    Args:
        proof: as in `EnrolmentRequest`.
        renews: the key of its present credentials.
        present: `proof_of` signed with the seed of that one.
        jwt: the present credentials: a coordinator whose log was put back may not know of them.
    """

    key: str
    proof: str = ""
    renews: str = ""
    present: str = ""
    jwt: str = ""


class RegionRenewalRequest(Message):
    """A region asks for new credentials of its processes; the subject names the region.

    Args:
        keys: public nkeys by the file that they are for; their seeds stay where they were made.
        renews: a key of the region's present credentials.
        present: `proof_of_region` signed with the seed of that one, base64.
        csr: a certificate signing request (RFC 2986, PEM) for the leaf; empty: it has a certificate of its own.
        certificate: the present one of the leaf, PEM; the new one answers for the same hosts.
        shown: `proof_of_region` signed (ECDSA, SHA-256) with the key of that one, base64.
    """

    keys: dict[str, str]
    renews: str
    present: str
    csr: str = ""
    certificate: str = ""
    shown: str = ""


class RegionRenewalAnswer(Message):
    """A JWT for each file that was named, and what else is new; or why there is none."""

    jwts: dict[str, str] = Field(default_factory=dict)
    files: dict[str, str] = Field(default_factory=dict)
    note: str = Field(default="", description="Why there is no new certificate among the files")
    error: str = ""
    remedy: str = ""


def proof_of_region(region: str, keys: Mapping[str, str], csr: str) -> bytes:
    """What a region signs to show that it holds its present keys."""
    named = " ".join(f"{file}={key}" for file, key in sorted(keys.items()))
    return f"fedtide credentials of region {region} for {named}\n{csr}".encode()


def proof_of(region: str, node: str, key: str) -> bytes:
    """What a node signs to show that it holds a key: for itself, and for nobody else."""
    return f"fedtide credentials of {region}/{node} for {key}".encode()


class CredentialsAnswer(Message):
    """The answer: a JWT for the key that was named, or why there is none."""

    jwt: str = ""
    error: str = ""
    remedy: str = ""
