"""Where in a run a task belongs; that of a driven task stands in its name."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class PhaseId:
    """The round and phase of a message; `driven`: the next attempt would send it under the same name."""

    round: int
    trial: int
    phase: str
    driven: bool


NO_PHASE = PhaseId(0, 1, "", driven=False)


def place_of(task: str, run: str) -> PhaseId | None:
    """The place that is in the name of a driven task; None for any other task."""
    found = re.match(r"(?:-l\d+)?-r(\d+)-t(\d+)-([a-z_]+)-", task.removeprefix(run))
    if found is None:
        return None
    return PhaseId(int(found[1]), int(found[2]), found[3], driven=True)
