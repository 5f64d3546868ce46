"""The phases of a driven round, with the messages sent and the replies counted in them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from flwr.app import Message

from fedtide.aggregation.folding.in_flight import Node
from fedtide.aggregation.folding.ingest import Expect
from fedtide.aggregation.link.phase_id import PhaseId
from fedtide.aggregation.sums.admission import Refusal
from fedtide.aggregation.sums.round_sum import RoundSum
from fedtide.fabric.errors import FedtideError
from fedtide.fabric.flower import bridge as flower
from fedtide.fabric.messages.tasks import Reply

Admission = Callable[[Message, Message], Refusal | None]
"""(what was sent, the reply) -> why the reply does not count, or None."""


class TooFewUpdates(FedtideError):
    """A phase ended with fewer answers than its run needs; `hopeless`: another trial would end in the same way."""

    hopeless = False

    @classmethod
    def of(cls, counted: int, asked: int, needed: int, cause: str, refused: Refused) -> TooFewUpdates:
        """Says what most answers were refused for."""
        why, times = refused.commonest()
        told = f"; {times} of them: {why.partition(chr(10))[0]}" if why else ""
        error = cls(f"{counted} of {asked} nodes gave an update that counts, needed are {needed} ({cause}{told})")
        error.hopeless = bool(asked) and refused.alike == asked
        return error


@dataclass
class Refused:
    """Why answers of a phase were refused. `alike`: how many, if all for the same error of the app."""

    reasons: Counter[str] = field(default_factory=Counter)
    of_app: int = 0

    def add(self, reason: str, code: int) -> None:
        self.reasons[reason] += 1
        self.of_app += code in flower.APP_ERRORS

    def commonest(self) -> tuple[str, int]:
        return max(self.reasons.items(), key=lambda item: item[1], default=("", 0))

    @property
    def alike(self) -> int:
        return self.of_app if len(self.reasons) == 1 and self.of_app == self.reasons.total() else 0


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
    reply: Reply
