"""Log lines for people and machines: an event-style name, then its fields as key=value.

What is traced has two more fields, trace_id and span_id, as OpenTelemetry names them.
"""

from __future__ import annotations

import logging
import sys
from contextvars import ContextVar
from typing import TextIO

from fedtide.fabric import trace_context

TENANT: ContextVar[str] = ContextVar("tenant", default="")
"""Whom a task works for, in a process that serves several."""
_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


class FieldFormatter(logging.Formatter):
    """Appends the record's `extra` fields."""

    def format(self, record: logging.LogRecord) -> str:
        line = super().format(record)
        fields = [f"{k}={v}" for k, v in vars(record).items() if k not in _STANDARD]
        if tenant := TENANT.get():
            fields.append(f"tenant={tenant}")
        if (context := trace_context.current()) is not None:
            fields += [f"trace_id={context.trace}", f"span_id={context.span}"]
        return f"{line} {' '.join(fields)}" if fields else line


def handler(stream: TextIO) -> logging.Handler:
    """Writes records to a stream."""
    made = logging.StreamHandler(stream)
    made.setFormatter(FieldFormatter("%(asctime)s %(levelname)s %(name)s %(message)s"))
    return made


def to_stderr(level: int = logging.INFO) -> None:
    """Log to standard error from here on (a process calls this once, in its main)."""
    logging.basicConfig(level=level, handlers=[handler(sys.stderr)], force=True)
