"""Which orders there are for a node. Pure data."""

from __future__ import annotations

from pydantic import Field

from fedtide.fabric.strict import Message


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
