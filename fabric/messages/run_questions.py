"""What an aggregator asks its coordinator, and the answers; the run is that of the subject. Pure data."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from fedtide.fabric.strict import Message, Strict

Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class CohortQuestion(Message):
    """Which nodes take part in this phase?"""

    run: str
    attempt: int
    round: int
    trial: int
    phase: str
    needed: int = Field(default=0, ge=0, description="Fewer nodes than this are of no use to it")


class Member(Strict):
    name: str
    region: str
    codecs: list[str] = []


class Cohort(Message):
    """`superseded`: the asking attempt is no longer wanted and must end. `online`: all nodes that are online.

    `held`: why the round may not begin now; it has no nodes then.
    """

    nodes: list[Member] = []
    online: list[str] = []
    superseded: bool = False
    held: str = ""
    director: str = Field(default="", description="Whose mandates count now: ids of keys")


class RepliesWanted(Message):
    """Make the consumers through which this attempt reads replies; an older attempt gets no more."""

    attempt: int


class RepliesReady(Message):
    """`superseded`: as in `Cohort`."""

    superseded: bool = False


class BacklogQuestion(Message):
    """How many replies wait for this attempt?"""

    attempt: int


class ReplyBacklog(Message):
    """Replies in the run's consumers that were not delivered, and those that were delivered and not acknowledged.

    `superseded`: as in `Cohort`.
    """

    waiting: int = 0
    unacknowledged: int = 0
    superseded: bool = False


class MandateWanted(Message):
    """Let me speak for the run: with this key, for so long.

    Args:
        key: an Ed25519 public key, hexadecimal.
    """

    attempt: int
    key: Digest


class MandateGiven(Message):
    """`mandate`: what the director has signed; empty: this installation signs nothing. `superseded`: as in `Cohort`."""

    mandate: str = ""
    superseded: bool = False


class Purge(Message):
    """Delete what a run has stored; an attempt that was replaced may not.

    Args:
        updates: digests of updates in the streams of regions and of the hub; None: all of the run's.
        staying: the same, of updates that stay in their regions.
        models: digests of its rounds' models.
        states: digests of what its checkpoints consist of.
    """

    attempt: int
    updates: list[Digest] | None = []
    staying: list[Digest] | None = []
    models: list[Digest] = []
    states: list[Digest] = []


class Purged(Message):
    """`left`: regions that could not be reached; there it expires. `superseded`: nothing was deleted."""

    left: list[str] = []
    superseded: bool = False
