"""A round as the coordinator sees it: who was asked, who answered, who does not count and why.

    (none) --RoundOpened--> Collecting --RoundClosed--> Closed
                                  \\--the run ended-----> Abandoned

Pure. A node's answer to one phase of one round counts once, whatever is delivered again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from fabric.events import RoundClosed, RoundOpened, UpdateReceived, UpdateRefused

RoundEvent = RoundOpened | UpdateReceived | UpdateRefused | RoundClosed


@dataclass(frozen=True, slots=True)
class Refused:
    category: str
    reason: str


@dataclass(frozen=True, slots=True)
class Tally:
    """One phase (train, evaluate, ...) of a round. A node is in one of `received`, `refused`, or awaited."""

    asked: frozenset[str] = frozenset()
    received: frozenset[str] = frozenset()
    refused: Mapping[str, Refused] = field(default_factory=dict)
    bytes_down: int = 0
    bytes_up: int = 0

    @property
    def awaited(self) -> frozenset[str]:
        return self.asked - self.received - self.refused.keys()


@dataclass(frozen=True, slots=True)
class Collecting:
    number: int
    phases: Mapping[str, Tally]


@dataclass(frozen=True, slots=True)
class Closed:
    number: int
    phases: Mapping[str, Tally]
    metrics: Mapping[str, float]
    seconds: float


@dataclass(frozen=True, slots=True)
class Abandoned:
    number: int
    phases: Mapping[str, Tally]
    reason: str


Round = Collecting | Closed | Abandoned


def step(state: Round | None, event: RoundEvent) -> Round:
    """The round after `event`; answers to a closed round change nothing but its books of refusals."""
    match event:
        case RoundClosed(round=number, metrics=metrics, seconds=seconds):
            if isinstance(state, Closed):
                return state
            return Closed(number, state.phases if state is not None else {}, metrics, seconds)
        case RoundOpened(round=number, phase=phase, nodes=nodes, bytes_down=size):
            state = state if state is not None else Collecting(number, {})
            tally = state.phases.get(phase, Tally())
            if tally.asked.issuperset(nodes):
                return state  # a resumed round asks for what it asked for before
            opened = replace(tally, asked=tally.asked | set(nodes), bytes_down=tally.bytes_down + size)
            return _with(state, phase, opened)
        case UpdateReceived(phase=phase, node=node, bytes_up=size):
            state = state if state is not None else Collecting(event.round, {})
            tally = state.phases.get(phase, Tally())
            if node in tally.received or node in tally.refused:
                return state
            return _with(state, phase, replace(tally, received=tally.received | {node}, bytes_up=tally.bytes_up + size))
        case UpdateRefused(phase=phase, node=node, category=category, reason=reason):
            state = state if state is not None else Collecting(event.round, {})
            tally = state.phases.get(phase, Tally())
            if node in tally.received or not _says_more(tally.refused.get(node), category):
                return state
            return _with(state, phase, replace(tally, refused={**tally.refused, node: Refused(category, reason)}))


def _says_more(known: Refused | None, category: str) -> bool:
    """A node that was given up and answers after all is late; otherwise the first word stands."""
    return known is None or (category == "late" and known.category in ("timeout", "node_lost"))


def abandon(state: Round, reason: str) -> Round:
    """What becomes of a round when its run ends."""
    return Abandoned(state.number, state.phases, reason) if isinstance(state, Collecting) else state


def _with(state: Round, phase: str, tally: Tally) -> Round:
    return replace(state, phases={**state.phases, phase: tally})
