"""The phases of a driven round, with the messages sent and the replies counted in them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from flwr.app import Message

from fedtide.aggregation.folding.in_flight import Node
from fedtide.aggregation.folding.ingest import Expect
from fedtide.aggregation.grid.outgoing import PhaseId
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
    """A sent message: the context that its reply is interpreted with."""

    message: Message
    node: Node
    place: PhaseId
    expires_at: float


@dataclass(frozen=True, slots=True)
class Folding:
    """`expect` begins to fold one update; `total` gives the phase's sum, once its messages are configured."""

    expect: Expect
    total: Callable[[], RoundSum]


@dataclass(frozen=True, slots=True)
class Phase:
    """A driven phase of a round.

    `pinned`: the candidate nodes, if they were fixed before a crash. `before_send`: called with the candidate
    nodes before the first message is sent. `folding`: how updates are folded on arrival, if they are.
    """

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
    def place(self) -> PhaseId:
        return PhaseId(self.round, self.trial, self.name, driven=True)


@dataclass(frozen=True, slots=True)
class Counted:
    """An answer that counts, and the round whose model it was trained from."""

    task: str
    message: Message
    asked: Asked
    size_bytes: int
    seconds: float
