"""What apps print and log: lines, and the questions about them. Pure data."""

from __future__ import annotations

from pydantic import AwareDatetime, Field

from fedtide.fabric.strict import Message, Strict

MOST_BYTES = 2 * 1024 * 1024
"""Of one page of lines."""


class LogLine(Message):
    """`level` is empty for what was printed."""

    at: AwareDatetime = Field(description="Of its writer; increases from line to line")
    level: str = ""
    task: str = ""
    text: str


class LogQuestion(Strict):
    """What an app has printed in a run, after a moment."""

    after: AwareDatetime | None = None


class LogPage(Message):
    """`more`: ask again, after the last line."""

    lines: list[LogLine] = []
    more: bool = False

    @classmethod
    def of(cls, lines: list[LogLine]) -> LogPage:
        """As many of the lines, from the first on, as a message holds."""
        size = 0
        for number, line in enumerate(lines):
            size += len(line.text) * 2 + 200
            if size > MOST_BYTES:
                return cls(lines=lines[:number], more=True)
        return cls(lines=lines)


class LogSegment(Message):
    """A part of what an aggregator has printed: the `number`-th of its attempt."""

    attempt: int
    number: int
    lines: list[LogLine]
