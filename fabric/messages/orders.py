"""Which orders there are for a node. Pure data."""

from __future__ import annotations

from fedtide.fabric.strict import Message


class OrderList(Message):
    """The subjects in the stream DOWN that hold a message for the node that asked."""

    subjects: list[str] = []
