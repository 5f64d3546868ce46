"""What has become of each task's reply: events in, actions out. Pure, as the state machine of h11 is.

    (unknown) --Sent--> Waiting --Delivered--> Reading --ReadDone/ReadFailed--> Taken --RoundClosed--> Closed
    (unknown) --Delivered--> Held --Sent--> Reading --ReadBrokenOff--> Waiting --NoReply/GivenUp--> (unknown)

A reply is acknowledged with its round, so that the next attempt finds it if this one dies: until then it is `Held` (it
came before it was asked for) or `Taken`. Of two replies to one task the first counts. A task whose reply is no longer
wanted (its time is up, its node is gone, its phase is over) leaves `Waiting`; if it is being read, `Reading.wanted` is
false from then on. `TABLE` says what happens in which state; a pair that is not in it changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

from fedtide.aggregation.folding.in_flight import RefusalCategory


@dataclass(frozen=True, slots=True)
class Waiting:
    """Asked, no reply yet. `leaving`: its node is away, and has a grace time to return."""

    node: str
    leaving: bool = False


@dataclass(frozen=True, slots=True)
class Reading:
    """The tensors of its reply are being read. `wanted`: somebody waits for them."""

    node: str
    sequence: int
    wanted: bool = True


@dataclass(frozen=True, slots=True)
class Held:
    """A reply to a task that was not sent by this attempt (yet)."""

    sequence: int


@dataclass(frozen=True, slots=True)
class Taken:
    """Handed on, or refused. `sequence` None: acknowledged already."""

    sequence: int | None


@dataclass(frozen=True, slots=True)
class Closed:
    """Its round is over: whatever still comes is a duplicate."""


State = Waiting | Reading | Held | Taken | Closed

CLOSED_KEPT = 5
"""For so many closings a duplicate is known as such; later it is late, which costs nothing but a line."""


@dataclass(frozen=True, slots=True)
class Sent:
    """A task is given to a node, or adopted from an earlier attempt (which has published it)."""

    task: str
    node: str
    adopted: bool = False


@dataclass(frozen=True, slots=True)
class Delivered:
    """A reply came from `node`; `sequence` is the same if it is delivered again, another for a copy of it."""

    task: str
    node: str
    sequence: int


@dataclass(frozen=True, slots=True)
class ReadDone:
    task: str


@dataclass(frozen=True, slots=True)
class ReadFailed:
    """The reply cannot be used."""

    task: str
    reason: str
    category: RefusalCategory


@dataclass(frozen=True, slots=True)
class ReadBrokenOff:
    """The broker went away while it was read: the reply is delivered again."""

    task: str


@dataclass(frozen=True, slots=True)
class NoReply:
    """None will come: the task has expired, was given up before, or its node stayed away."""

    task: str
    reason: str
    category: RefusalCategory = "node_lost"


@dataclass(frozen=True, slots=True)
class GivenUp:
    """Nobody waits for it any more."""

    task: str


@dataclass(frozen=True, slots=True)
class NodeLeft:
    """For one task of a node that went away."""

    task: str
    why: str


@dataclass(frozen=True, slots=True)
class NodeReturned:
    task: str


@dataclass(frozen=True, slots=True)
class RoundClosed:
    """For one task, when a round is closed. `counted`: the round has processed its reply."""

    task: str
    counted: bool
    carries: bool


@dataclass(frozen=True, slots=True)
class ResumeDisabled:
    """For one task: rounds cannot be resumed, so nothing is kept for a next attempt."""

    task: str


Event = (
    Sent
    | Delivered
    | ReadDone
    | ReadFailed
    | ReadBrokenOff
    | NoReply
    | GivenUp
    | NodeLeft
    | NodeReturned
    | RoundClosed
    | ResumeDisabled
)


@dataclass(frozen=True, slots=True)
class Publish:
    """Send the task to its node."""

    task: str


@dataclass(frozen=True, slots=True)
class Read:
    """Read the tensors of the reply; ends in `ReadDone`, `ReadFailed` or `ReadBrokenOff`."""

    task: str
    sequence: int


@dataclass(frozen=True, slots=True)
class HandOn:
    """Give what was read to whoever waits for it."""

    task: str


@dataclass(frozen=True, slots=True)
class TellLost:
    """Tell whoever waits that no reply will come."""

    task: str
    reason: str
    category: RefusalCategory


@dataclass(frozen=True, slots=True)
class CancelOrder:
    """A node that returns should not work on it."""

    task: str
    node: str


@dataclass(frozen=True, slots=True)
class StartGrace:
    task: str
    why: str


@dataclass(frozen=True, slots=True)
class StopGrace:
    task: str


@dataclass(frozen=True, slots=True)
class Late:
    """The reply came, and counts in no round."""

    task: str
    sequence: int


@dataclass(frozen=True, slots=True)
class Acknowledge:
    """It need not be delivered again."""

    sequence: int


@dataclass(frozen=True, slots=True)
class Forget:
    """Its tensors may be deleted."""

    task: str


Action = Publish | Read | HandOn | TellLost | CancelOrder | StartGrace | StopGrace | Late | Acknowledge | Forget
Actions = tuple[Action, ...]
Step = tuple[State | None, Actions]


class ReplyLedger:
    """The replies of one attempt of an aggregator. `step` is its only way to change."""

    def __init__(self) -> None:
        self._states: dict[str, State] = {}
        self._closed: dict[str, int] = {}
        """Closed tasks, each with the number of the closing; kept apart, because there are more with every round."""
        self._closings = 0
        self.resumable = True
        """Whether a next attempt could use what is not acknowledged."""

    def step(self, event: Event) -> Actions:
        """Take one event; returns what follows, in the order in which it is to be done."""
        before = self._states.get(event.task, Closed() if event.task in self._closed else None)
        rule = TABLE.get((type(before), type(event)))
        if rule is None:
            return ()
        after, actions = rule(before, event, self.resumable)
        self._states.pop(event.task, None)
        self._closed.pop(event.task, None)
        if isinstance(after, Closed):
            self._closed[event.task] = self._closings
        elif after is not None:
            self._states[event.task] = after
        return actions

    def close_round(self, counted: Collection[str], *, carries: bool) -> Actions:
        """`RoundClosed` for every task.

        Args:
            counted: tasks whose replies the round has processed.
            carries: replies that were taken and not counted stay, for a later round.
        """
        self._closings += 1
        self._closed = {t: n for t, n in self._closed.items() if n > self._closings - CLOSED_KEPT}
        return tuple(a for t in list(self._states) for a in self.step(RoundClosed(t, t in counted, carries)))

    def disable_resume(self) -> Actions:
        """`ResumeDisabled` for every task: from now on a reply is acknowledged when it was taken."""
        self.resumable = False
        return tuple(a for task in list(self._states) for a in self.step(ResumeDisabled(task)))

    def is_wanted(self, task: str) -> bool:
        """Whether somebody waits for the reply to a task."""
        state = self._states.get(task)
        return isinstance(state, Waiting) or (isinstance(state, Reading) and state.wanted)

    def wanted(self, node: str | None = None) -> list[str]:
        """The tasks (of one node) that somebody waits for."""
        found = [(t, s) for t, s in self._states.items() if isinstance(s, Waiting | Reading) and self.is_wanted(t)]
        return [task for task, state in found if node in (None, state.node)]

    @property
    def unacknowledged(self) -> int:
        """How many replies are kept for a next attempt."""
        return sum(isinstance(s, Held | Taken) and s.sequence is not None for s in self._states.values())


def _send(state: None, event: Sent, resumable: bool) -> Step:
    return Waiting(event.node), () if event.adopted else (Publish(event.task),)


def _send_again(state: Closed, event: Sent, resumable: bool) -> Step:
    return _send(None, event, resumable)


def _answered_before(state: Held, event: Sent, resumable: bool) -> Step:
    """The reply is there already: its node is not asked again."""
    return Reading(event.node, state.sequence), (Read(event.task, state.sequence),)


def _answered(state: Waiting, event: Delivered, resumable: bool) -> Step:
    stop: Actions = (StopGrace(event.task),) if state.leaving else ()
    return Reading(state.node, event.sequence), (*stop, Read(event.task, event.sequence))


def _unasked(state: None, event: Delivered, resumable: bool) -> Step:
    return (Held(event.sequence), ()) if resumable else (None, (Acknowledge(event.sequence),))


def _again(state: Held | Reading | Taken, event: Delivered, resumable: bool) -> Step:
    """The same one is kept: acknowledged now, it would be lost to the next attempt. A copy is not needed."""
    return state, () if event.sequence == state.sequence else (Acknowledge(event.sequence),)


def _too_late(state: Closed, event: Delivered, resumable: bool) -> Step:
    return state, (Acknowledge(event.sequence),)


def _taken(task: str, state: Reading, resumable: bool, actions: Actions) -> Step:
    if resumable:
        return Taken(state.sequence), actions
    return Taken(None), (*actions, Acknowledge(state.sequence))


def _read(state: Reading, event: ReadDone, resumable: bool) -> Step:
    return _taken(event.task, state, resumable, (HandOn(event.task),) if state.wanted else ())


def _unusable(state: Reading, event: ReadFailed, resumable: bool) -> Step:
    told: Actions = ()
    if state.wanted:
        told = (TellLost(event.task, event.reason, event.category), CancelOrder(event.task, state.node))
    return _taken(event.task, state, resumable, told)


def _broken_off(state: Reading, event: ReadBrokenOff, resumable: bool) -> Step:
    return (Waiting(state.node) if state.wanted else None), ()


def _lost(state: Waiting, event: NoReply, resumable: bool) -> Step:
    stop: Actions = (StopGrace(event.task),) if state.leaving else ()
    told = TellLost(event.task, event.reason, event.category)
    return None, (*stop, told, CancelOrder(event.task, state.node))


def _lost_while_read(state: Reading, event: NoReply, resumable: bool) -> Step:
    if not state.wanted:
        return state, ()
    told = TellLost(event.task, event.reason, event.category)
    return replace(state, wanted=False), (told, CancelOrder(event.task, state.node))


def _given_up(state: Waiting, event: GivenUp, resumable: bool) -> Step:
    stop: Actions = (StopGrace(event.task),) if state.leaving else ()
    return None, (*stop, CancelOrder(event.task, state.node))


def _given_up_while_read(state: Reading, event: GivenUp, resumable: bool) -> Step:
    return replace(state, wanted=False), (CancelOrder(event.task, state.node),) if state.wanted else ()


def _node_left(state: Waiting, event: NodeLeft, resumable: bool) -> Step:
    return replace(state, leaving=True), () if state.leaving else (StartGrace(event.task, event.why),)


def _node_returned(state: Waiting, event: NodeReturned, resumable: bool) -> Step:
    return replace(state, leaving=False), (StopGrace(event.task),) if state.leaving else ()


def _close_held(state: Held, event: RoundClosed, resumable: bool) -> Step:
    late: Actions = () if event.counted else (Late(event.task, state.sequence),)
    return Closed(), (*late, Acknowledge(state.sequence), Forget(event.task))


def _close_taken(state: Taken, event: RoundClosed, resumable: bool) -> Step:
    if event.carries and not event.counted:
        return state, ()
    if state.sequence is None:
        return Closed(), (Forget(event.task),)
    late: Actions = () if event.counted else (Late(event.task, state.sequence),)
    return Closed(), (*late, Acknowledge(state.sequence), Forget(event.task))


def _not_kept(state: Held, event: ResumeDisabled, resumable: bool) -> Step:
    return None, (Acknowledge(state.sequence),)


_NONE = type(None)
TABLE: Mapping[tuple[type, type], Callable[[Any, Any, bool], Step]] = {
    (_NONE, Sent): _send,
    (_NONE, Delivered): _unasked,
    (Waiting, Delivered): _answered,
    (Waiting, NoReply): _lost,
    (Waiting, GivenUp): _given_up,
    (Waiting, NodeLeft): _node_left,
    (Waiting, NodeReturned): _node_returned,
    (Reading, Delivered): _again,
    (Reading, ReadDone): _read,
    (Reading, ReadFailed): _unusable,
    (Reading, ReadBrokenOff): _broken_off,
    (Reading, NoReply): _lost_while_read,
    (Reading, GivenUp): _given_up_while_read,
    (Held, Sent): _answered_before,
    (Held, Delivered): _again,
    (Held, RoundClosed): _close_held,
    (Held, ResumeDisabled): _not_kept,
    (Taken, Delivered): _again,
    (Taken, RoundClosed): _close_taken,
    (Closed, Sent): _send_again,
    (Closed, Delivered): _too_late,
}
