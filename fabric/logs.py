"""Log lines for people and machines: an event-style name, then its fields as key=value."""

from __future__ import annotations

import logging
import sys
from typing import TextIO

_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


class FieldFormatter(logging.Formatter):
    """Appends the record's `extra` fields."""

    def format(self, record: logging.LogRecord) -> str:
        line = super().format(record)
        fields = [f"{k}={v}" for k, v in vars(record).items() if k not in _STANDARD]
        return f"{line} {' '.join(fields)}" if fields else line


def handler(stream: TextIO) -> logging.Handler:
    """Writes records to a stream."""
    made = logging.StreamHandler(stream)
    made.setFormatter(FieldFormatter("%(asctime)s %(levelname)s %(name)s %(message)s"))
    return made


def to_stderr(level: int = logging.INFO) -> None:
    """Log to standard error from here on (a process calls this once, in its main)."""
    logging.basicConfig(level=level, handlers=[handler(sys.stderr)], force=True)
