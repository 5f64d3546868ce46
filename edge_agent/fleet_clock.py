"""The fleet's time on a node whose own clock may be wrong by years: the coordinator's, as it told it last."""

from __future__ import annotations

import time


class FleetClock:
    """The machine's own time until the coordinator has told its time. Setting the machine's clock changes nothing."""

    def __init__(self) -> None:
        self._told: tuple[float, float] | None = None
        self.own_ahead_s = 0.0
        """By how much the machine's clock was ahead when it was compared last."""

    def told(self, now: float, waited_s: float) -> None:
        """The coordinator's time in an answer, for which was waited so long (the way back is half of that)."""
        there = now + waited_s / 2
        self._told = there, time.monotonic()
        self.own_ahead_s = time.time() - there

    @property
    def is_told(self) -> bool:
        """Whether it is the coordinator's time, not the machine's."""
        return self._told is not None

    def now(self) -> float:
        """Seconds since the epoch."""
        if self._told is None:
            return time.time()
        there, at = self._told
        return there + time.monotonic() - at
