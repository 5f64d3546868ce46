"""Which orders there are for a node. Pure data."""

from __future__ import annotations

from pydantic import Field

from fedtide.fabric.strict import Message


class OrderList(Message):
    """The subjects in the streams ORDERS and DOWN that hold a message for the node that asked.

    Args:
        now: the coordinator's time, by which it dates what expires; seconds since the epoch.
    """

    subjects: list[str] = []
    now: float | None = Field(default=None, allow_inf_nan=False)
