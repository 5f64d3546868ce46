"""The phases that a round driver drives, and what was asked and counted in them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from flwr.app import Message

from fedtide.aggregation.folding.in_flight import Node
from fedtide.aggregation.folding.ingest import Expect
from fedtide.aggregation.grid.outgoing import Place
from fedtide.aggregation.sums.admission import Refusal
from fedtide.aggregation.sums.round_sum import RoundSum
from fedtide.fabric.errors import FedtideError

Admission = Callable[[Message], Refusal | None]


class TooFewUpdates(FedtideError):
    """A phase ended with fewer answers than its run needs."""

    @classmethod
    def of(cls, counted: int, asked: int, needed: int, cause: str) -> TooFewUpdates:
        return cls(f"{counted} of {asked} nodes gave an update that counts, needed are {needed} ({cause})")


@dataclass(frozen=True, slots=True)
class Asked:
    """A message on its way: what its answer needs to be understood."""

    message: Message
    node: Node
    place: Place
    expires_at: float


@dataclass(frozen=True, slots=True)
class Folding:
    """`expect` begins one update; `total` is the sum that they are in, once the phase's messages are made."""

    expect: Expect
    total: Callable[[], RoundSum]


@dataclass(frozen=True, slots=True)
class Phase:
    """A driven phase: `pinned` are the nodes to choose from, if that was settled before a crash;
    `before_send` is told the nodes that stood to choice, before the first message leaves; `folding`
    says how updates are folded while they arrive, if they are."""

    round: int
    trial: int
    name: str
    admission: Admission | None
    pinned: list[Node] | None
    before_send: Callable[[list[Node]], None]
    folding: Folding | None = None

    def key(self, run: str) -> str:
        """Names this phase's sum."""
        return f"{run}-r{self.round}-t{self.trial}"

    @property
    def place(self) -> Place:
        return Place(self.round, self.trial, self.name, driven=True)


@dataclass(frozen=True, slots=True)
class Counted:
    """An answer that counts, and the round whose model it was trained from."""

    task: str
    message: Message
    asked: Asked
    size_bytes: int
    seconds: float
