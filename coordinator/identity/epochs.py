"""Which log this is: a log that was lost, or put back from a backup, is another one for nodes and regions. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from fedtide.fabric.events.identity import LogBegun, LogRestored


@dataclass(frozen=True, slots=True)
class Epoch:
    """`generation`: how often the log was put back; orders of a higher one go over all that nodes have seen."""

    id: str = ""
    generation: int = 0
    restored_at: datetime | None = None


def step(state: Epoch, event: LogBegun | LogRestored, at: datetime) -> Epoch:
    match event:
        case LogBegun(epoch=id):
            return state if state.id else Epoch(id)
        case LogRestored(epoch=id):
            return Epoch(id, state.generation + 1, at)
