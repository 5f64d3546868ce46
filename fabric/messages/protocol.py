"""Which versions of the protocol between cloud and nodes a process speaks. Pure data.

A change that an older reader cannot ignore gets a new number. Peers tell their range when they join, and are spoken
to in the highest version that both have.
"""

from __future__ import annotations

from pydantic import Field, model_validator

from fedtide.fabric.strict import Strict


class ProtocolRange(Strict):
    """From `lowest` to `highest`, both included. A node that tells none speaks version 1."""

    lowest: int = Field(default=1, ge=1)
    highest: int = Field(default=1, ge=1)

    @model_validator(mode="after")
    def _ordered(self) -> ProtocolRange:
        if self.lowest > self.highest:
            raise ValueError("`lowest` is above `highest`")
        return self


OURS = ProtocolRange(lowest=1, highest=1)


def common(theirs: ProtocolRange, ours: ProtocolRange = OURS) -> int | None:
    """The version to speak with a peer, or None."""
    highest = min(theirs.highest, ours.highest)
    return highest if highest >= max(theirs.lowest, ours.lowest) else None


def why_not(theirs: ProtocolRange, ours: ProtocolRange = OURS) -> str | None:
    """Why a peer cannot be spoken to, or None."""
    if common(theirs, ours) is not None:
        return None
    older = "it" if theirs.highest < ours.lowest else "this installation"
    return (
        f"speaks protocol {theirs.lowest} to {theirs.highest}, this installation {ours.lowest} to {ours.highest}: "
        f"upgrade {older}"
    )
