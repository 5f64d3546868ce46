"""What a coordinator asks its release authority to sign, and the answer. Pure data."""

from __future__ import annotations

from pydantic import Field

from fedtide.fabric.messages.trust import TrustMetadata
from fedtide.fabric.strict import Message

MOST_BYTES = 1 << 20


class AttestationWanted(Message):
    """Vouch for this release.

    Args:
        manifest: of the release, as it is stored.
        statement: what is to be signed (fabric.trust.provenance).
        produced: the event with which the run's aggregator has reported the model.
        base: the manifest of the release that the run started from, and its attestation; empty: there is none.
        trust: metadata that may be newer than the authority's.
    """

    manifest: bytes = Field(max_length=MOST_BYTES)
    statement: bytes = Field(max_length=MOST_BYTES)
    produced: bytes = Field(max_length=MOST_BYTES)
    base: bytes = Field(default=b"", max_length=MOST_BYTES)
    base_attestation: str = Field(default="", max_length=2 * MOST_BYTES)
    trust: TrustMetadata


class AttestationGiven(Message):
    """`envelope`: the statement with the authority's signature. `error`: why there is none."""

    envelope: str = ""
    error: str = ""
    remedy: str = ""
