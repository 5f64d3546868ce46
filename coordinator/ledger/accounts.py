"""What was used for one run, one roll-out, or for none: lines of whole numbers, added to and never changed back. Pure.

A line says when (the hour), where and what for; quantities are in the units of `fabric.plans.prices`. Nothing is
rounded before it is priced, so sums are the same in every order.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any, NamedTuple, cast

from immutables import Map

from fedtide.fabric.messages.usage import Usage
from fedtide.fabric.plans.prices import Meter

USEFUL = "useful"
NOBODY = ""
"""The account of what was used for no run and no roll-out."""


class Line(NamedTuple):
    """`hour`: since 1970, UTC. `round`: 0 for none. `outcome`: `useful`, or why not. Texts hold no slash."""

    hour: int
    round: int
    region: str
    pool: str
    phase: str
    outcome: str
    meter: Meter

    @property
    def key(self) -> str:
        return "/".join(map(str, self))

    @classmethod
    def of(cls, key: str) -> Line:
        hour, round_, region, pool, phase, outcome, meter = key.split("/")
        return cls(int(hour), int(round_), region, pool, phase, outcome, cast("Meter", meter))

    @property
    def at(self) -> datetime:
        return datetime.fromtimestamp(3600 * self.hour, UTC)


@dataclass(frozen=True, slots=True)
class Place:
    """Where and what for: a line without its meter."""

    hour: int
    round: int = 0
    region: str = ""
    pool: str = ""
    phase: str = "other"
    outcome: str = USEFUL

    def line(self, meter: Meter) -> Line:
        return Line(self.hour, self.round, self.region, self.pool, self.phase, self.outcome, meter)


@dataclass(frozen=True, slots=True)
class Answer:
    """What one node's answer took, in a round that is open. `place`: where it is booked now; `told`: what it said."""

    place: Place
    quantities: Mapping[Meter, int]
    told: Usage


@dataclass(frozen=True, slots=True)
class Account:
    """`tags`: what does not change, such as the model. `answers`: those of rounds that are open, by phase and node.

    `aggregators`: by attempt, the CPU time in µs that it has reported itself, and its whole one if it has ended.
    """

    tags: Mapping[str, str] = field(default_factory=dict)
    lines: Map[str, int] = field(default_factory=Map)
    answers: Map[str, Answer] = field(default_factory=Map)
    aggregators: Map[str, tuple[int, int]] = field(default_factory=Map)


class Entry:
    """What one event changes of an account. `lines`: by how much."""

    def __init__(self, account: Account) -> None:
        self.account = account
        self.lines: list[tuple[Line, int]] = []

    def set(self, **changes: Any) -> None:
        self.account = replace(self.account, **changes)

    def tag(self, **tags: str) -> None:
        """Set tags; those that are empty go."""
        self.set(tags={name: value for name, value in {**self.account.tags, **tags}.items() if value})

    def add(self, place: Place, quantities: Mapping[Meter, int]) -> None:
        lines = self.account.lines
        for meter, quantity in quantities.items():
            if quantity:
                line = place.line(meter)
                self.lines.append((line, quantity))
                now = lines.get(line.key, 0) + quantity
                lines = lines.set(line.key, now) if now else lines.delete(line.key)
        if lines is not self.account.lines:
            self.set(lines=lines)

    def answered(self, key: str, answer: Answer) -> None:
        """Add what an answer took, and remember where it is booked until its round is closed."""
        self.add(answer.place, answer.quantities)
        self.set(answers=self.account.answers.set(key, answer))

    def move(self, key: str, outcome: str) -> None:
        """Book what an answer took under another outcome."""
        answer = self.account.answers[key]
        self.add(answer.place, {meter: -quantity for meter, quantity in answer.quantities.items()})
        self.answered(key, replace(answer, place=replace(answer.place, outcome=outcome)))


def by_days(account: Account, before: int) -> Account:
    """The account with its lines of hours before `before` summed up by day (UTC)."""
    lines: dict[str, int] = {}
    for key, quantity in account.lines.items():
        line = Line.of(key)
        kept = line._replace(hour=line.hour - line.hour % 24).key if line.hour < before else key
        lines[kept] = lines.get(kept, 0) + quantity
    return replace(account, lines=Map(lines))


def quantities(usage: Usage) -> dict[Meter, int]:
    return {
        "cpu": usage.cpu_us,
        "memory": usage.memory_kb_s,
        "gpu": usage.gpu_us,
        "received": usage.received_bytes,
        "sent": usage.sent_bytes,
    }
