"""Decisions that depend on code, kept with the event that led to them: a replay takes them from the log.

Another version of the code may judge a gate or a rule differently. When an event is new, its decisions are made and
logged with it; on a replay the logged decisions are used, whatever this version would decide. Pure.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from fedtide.fabric.errors import MalformedMessage


class Decisions:
    """The decisions of one event. Afterwards `made` holds all of them, logged or new."""

    def __init__(self, logged: str = "") -> None:
        """Raises MalformedMessage if `logged` is not what `text` gave."""
        try:
            self._logged: dict[str, list[list[Any]]] = json.loads(logged) if logged else {}
        except ValueError as exc:
            raise MalformedMessage(f"decisions of an event: {exc}") from exc
        self.made: dict[str, list[list[Any]]] = {}

    def replay_or_decide(self, key: str, decide: Callable[[], list[Any]]) -> list[Any]:
        """The decision under `key`: as it was logged, else as `decide` makes it now.

        Args:
            key: names the decision; the n-th call with it gives the n-th decision of the event.
            decide: gives plain values.
        """
        made = self.made.setdefault(key, [])
        logged = self._logged.get(key, [])
        made.append(logged[len(made)] if len(made) < len(logged) else decide())
        return made[-1]

    @property
    def text(self) -> str:
        """As an attribute of the event; empty: nothing was decided."""
        return json.dumps(self.made, separators=(",", ":")) if self.made else ""
