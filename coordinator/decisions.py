"""Decisions that depend on code, kept with the event that led to them: a replay takes them from the log.

A gate's verdict, or whether a rule fires, may come out otherwise in another version. Live, the decision is made and
noted; on a replay what was noted is taken, whatever this version would decide. Pure.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from fedtide.fabric.errors import MalformedMessage


class Decisions:
    """Those of one event. `made` holds them all afterwards, whether they were read or made."""

    def __init__(self, logged: str = "") -> None:
        """Raises MalformedMessage if `logged` is not what `text` gave."""
        try:
            self._logged: dict[str, list[list[Any]]] = json.loads(logged) if logged else {}
        except ValueError as exc:
            raise MalformedMessage(f"decisions of an event: {exc}") from exc
        self.made: dict[str, list[list[Any]]] = {}

    def of(self, key: str, decide: Callable[[], list[Any]]) -> list[Any]:
        """The decision under `key`: as it was logged, else as `decide` makes it now.

        Args:
            key: what is decided; asked again within one event, the next decision under it.
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
