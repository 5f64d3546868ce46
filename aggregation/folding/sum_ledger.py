"""What of each update is in a round's sum, and who has summed it: events in, actions out. Pure, as `reply_ledger` is.

    (unknown) --Arrived--> Folding --Folded--> Summed
                              |--BrokenOff--> Half --Arrived--> Folding
                              |--Refused--> Withdrawing --Withdrawn--> Out
    (unknown) --ArrivedFor(place)--> Asked --Promised--> Elsewhere --Merged/Lost--> Summed
                                       |--Refused--> Out
                                       |--NoAnswer--> Folding, or (unknown) where only that place can sum

A place is a region's aggregator, or the shards beside this one. It is asked for an update when that arrives, and for
its sum once, at the end; that request lists what the sum must hold, so a place withdraws by itself what is not listed.
When a phase is over, nothing more is begun, and what is half there is withdrawn. A pair that is not in `TABLE` cannot
happen.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

SHARDS = ""
"""The place of all shards together; other places are regions."""


@dataclass(frozen=True, slots=True)
class Folding:
    """Its bytes are added to the sum here, as they arrive."""


@dataclass(frozen=True, slots=True)
class Half:
    """Some of its bytes are in the sum; its reading broke off."""


@dataclass(frozen=True, slots=True)
class Withdrawing:
    """The bytes that were added are subtracted."""


@dataclass(frozen=True, slots=True)
class Asked:
    """A place was asked to sum it."""

    place: str


@dataclass(frozen=True, slots=True)
class Elsewhere:
    """It counts; its place has promised to sum it."""

    place: str


@dataclass(frozen=True, slots=True)
class Summed:
    """It counts, and all of it is in the sum here."""


@dataclass(frozen=True, slots=True)
class Out:
    """It does not count, and nothing of it is in the sum."""


State = Folding | Half | Withdrawing | Asked | Elsewhere | Summed | Out


@dataclass(frozen=True, slots=True)
class Arrived:
    """Its reply is there, for the first time or again."""

    task: str


@dataclass(frozen=True, slots=True)
class ArrivedFor:
    """As `Arrived`, of an update that is to be summed at a place."""

    task: str
    place: str


@dataclass(frozen=True, slots=True)
class Folded:
    """All of its bytes are in the sum."""

    task: str


@dataclass(frozen=True, slots=True)
class BrokenOff:
    """The broker went away while it was read."""

    task: str


@dataclass(frozen=True, slots=True)
class Refused:
    """It does not fit, is malformed, or is no longer wanted."""

    task: str


@dataclass(frozen=True, slots=True)
class Withdrawn:
    task: str


@dataclass(frozen=True, slots=True)
class Promised:
    """Its place has summed it."""

    task: str


@dataclass(frozen=True, slots=True)
class NoAnswer:
    """Its place did not answer when it was asked."""

    task: str


@dataclass(frozen=True, slots=True)
class Merged:
    """The sum of its place is in the sum here."""

    task: str


@dataclass(frozen=True, slots=True)
class Lost:
    """Its place cannot deliver its sum."""

    task: str


@dataclass(frozen=True, slots=True)
class PhaseOver:
    """For one task, when nothing more may be added to the sum."""

    task: str


Event = (
    Arrived | ArrivedFor | Folded | BrokenOff | Refused | Withdrawn | Promised | NoAnswer | Merged | Lost | PhaseOver
)


@dataclass(frozen=True, slots=True)
class Fold:
    """Read the bytes that were not read yet; ends in `Folded`, `BrokenOff` or `Refused`."""

    task: str


@dataclass(frozen=True, slots=True)
class Withdraw:
    """Ends in `Withdrawn`; is asked for again at the end if it could not be done."""

    task: str


@dataclass(frozen=True, slots=True)
class Ask:
    """Ends in `Promised`, `Refused` or `NoAnswer`."""

    task: str
    place: str


@dataclass(frozen=True, slots=True)
class Drop:
    """It does not count, and none of its bytes were read."""

    task: str


@dataclass(frozen=True, slots=True)
class FoldInstead:
    """Read and add it here: it counts already."""

    task: str


Action = Fold | Withdraw | Ask | Drop | FoldInstead
Actions = tuple[Action, ...]
Step = tuple[State | None, Actions]


class SumLedger:
    """The updates of one sum. `step` is its only way to change."""

    def __init__(self) -> None:
        self._states: dict[str, State] = {}

    def step(self, event: Event) -> Actions:
        """Take one event; returns what follows, in the order in which it is to be done."""
        before = self._states.get(event.task)
        after, actions = TABLE[type(before), type(event)](before, event)
        if after is None:
            del self._states[event.task]
        else:
            self._states[event.task] = after
        return actions

    def close(self) -> Actions:
        """`PhaseOver` for every task."""
        return tuple(a for task in list(self._states) for a in self.step(PhaseOver(task)))

    def counts(self, task: str) -> bool:
        """Whether an update is in the sum, or promised to be."""
        return isinstance(self._states.get(task), Summed | Elsewhere)

    def elsewhere(self) -> dict[str, list[str]]:
        """The tasks that each place has promised and not delivered, in the order in which they came."""
        places: dict[str, list[str]] = {}
        for task, state in self._states.items():
            if isinstance(state, Elsewhere):
                places.setdefault(state.place, []).append(task)
        return places


def _fold(state: Half | None, event: Arrived | ArrivedFor) -> Step:
    return Folding(), (Fold(event.task),)


def _ask(state: None, event: ArrivedFor) -> Step:
    return Asked(event.place), (Ask(event.task, event.place),)


def _promised(state: Asked, event: Promised) -> Step:
    return Elsewhere(state.place), ()


def _drop(state: Asked, event: Refused) -> Step:
    return Out(), (Drop(event.task),)


def _without_an_answer(state: Asked, event: NoAnswer) -> Step:
    """Its region may have summed it: that is withdrawn there. Shards hold the only sum: the reply comes again."""
    return (None, (Drop(event.task),)) if state.place == SHARDS else (Folding(), (Fold(event.task),))


def _summed(state: Folding | Elsewhere, event: Folded | Merged) -> Step:
    return Summed(), ()


def _broken_off(state: Folding, event: BrokenOff) -> Step:
    return Half(), ()


def _withdraw(state: Folding | Half | Withdrawing, event: Refused | PhaseOver) -> Step:
    return Withdrawing(), (Withdraw(event.task),)


def _out(state: Withdrawing, event: Withdrawn) -> Step:
    return Out(), ()


def _fold_instead(state: Elsewhere, event: Lost) -> Step:
    return Summed(), (FoldInstead(event.task),)


def _stays(state: State, event: PhaseOver) -> Step:
    return state, ()


_NONE = type(None)
TABLE: Mapping[tuple[type, type], Callable[[Any, Any], Step]] = {
    (_NONE, Arrived): _fold,
    (_NONE, ArrivedFor): _ask,
    (Half, Arrived): _fold,
    (Half, ArrivedFor): _fold,
    (Half, PhaseOver): _withdraw,
    (Asked, Promised): _promised,
    (Asked, Refused): _drop,
    (Asked, NoAnswer): _without_an_answer,
    (Folding, Folded): _summed,
    (Folding, BrokenOff): _broken_off,
    (Folding, Refused): _withdraw,
    (Withdrawing, Withdrawn): _out,
    (Withdrawing, PhaseOver): _withdraw,
    (Elsewhere, Merged): _summed,
    (Elsewhere, Lost): _fold_instead,
    (Elsewhere, PhaseOver): _stays,
    (Summed, PhaseOver): _stays,
    (Out, PhaseOver): _stays,
}
