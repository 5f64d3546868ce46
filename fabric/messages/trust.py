"""What processes tell each other of whom to believe: TUF metadata, and why something was not believed. Pure data."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from fedtide.fabric.strict import Message, Strict

RefusalKind = Literal["rollback", "freeze", "wrong_target", "arbitrary", "expired", "unknown_signer", "owner"]
"""Why a node does not follow: the attacks of the TUF specification (section 1.5.2), and its owner's policy.

rollback: older than what was seen. freeze: nothing vouches that it is still true. wrong_target: signed for something
else. arbitrary: the signature is not one of these bytes, or there is none. expired: its time is over. unknown_signer:
nobody has delegated that to this key.
"""
REFUSAL_KINDS: tuple[RefusalKind, ...] = (
    "rollback",
    "freeze",
    "wrong_target",
    "arbitrary",
    "expired",
    "unknown_signer",
    "owner",
)
Refused = Literal["task", "cancel", "desired", "app", "release", "question", "fold", "metadata"]
"""What was not believed."""
MOST_METADATA = 256 * 1024
"""Characters of one metadata file."""
_File = Field(default="", max_length=MOST_METADATA)


class TrustMetadata(Message):
    """TUF metadata (https://theupdateframework.github.io/specification/), each file as its JSON; empty: unchanged.

    Args:
        roots: of consecutive versions, the oldest first.
    """

    roots: list[str] = Field(default=[], max_length=1000)
    timestamp: str = _File
    snapshot: str = _File
    targets: str = _File


class TrustKnown(Strict):
    """The versions that somebody has verified; 0: none. `root` 0 and `pin` set: it wants the root of that version."""

    root: int = Field(default=0, ge=0)
    timestamp: int = Field(default=0, ge=0)
