"""What an aggregator asks its coordinator, and the answer. Pure data."""

from __future__ import annotations

from fedtide.fabric.strict import Message, Strict


class CohortQuestion(Message):
    """Which nodes take part in this phase?"""

    run: str
    attempt: int
    round: int
    trial: int
    phase: str


class Member(Strict):
    name: str
    region: str
    codecs: list[str] = []


class Cohort(Message):
    """`superseded`: the asking attempt is no longer wanted and must end. `online`: all nodes that are online."""

    nodes: list[Member] = []
    online: list[str] = []
    superseded: bool = False
