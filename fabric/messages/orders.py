"""Which orders there are for a node. Pure data."""

from __future__ import annotations

from pydantic import Field

from fedtide.fabric.messages.trust import TrustKnown, TrustMetadata
from fedtide.fabric.strict import Message


class OrdersQuestion(Message):
    """Which orders are there for me, and who may give any?

    Args:
        known: the metadata that the asker has verified; None: it verifies none.
        nonce: is signed with the answer, so that it is the answer to this question.
    """

    known: TrustKnown | None = None
    nonce: str = Field(default="", max_length=64)


class OrderList(Message):
    """The subjects in the streams ORDERS and DOWN that hold a message for the node that asked.

    Args:
        now: the coordinator's time, by which it dates what expires; seconds since the epoch.
        epoch: which log it has; another one than before does not know everything of this node.
        member: whether it knows this node's credentials.
    """

    subjects: list[str] = []
    epoch: str = ""
    member: bool = True
    now: float | None = Field(default=None, allow_inf_nan=False)
    trust: TrustMetadata | None = Field(default=None, description="What is newer than what the asker knows")
