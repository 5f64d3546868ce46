"""What an app prints and logs, as lines in bounded files: with time, level and task, without escape codes.

In the app's process, records of `logging` are marked on standard error (`mark_records`), so that whoever reads its
output tells them from what it prints. A file that is full becomes the one before, whose lines go.
"""

from __future__ import annotations

import io
import json
import logging
import os
import re
import sys
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

from pydantic import ValidationError

from fedtide.fabric.messages.logs import LogLine

MAX_BYTES = 1024 * 1024
"""Of each of the two files of a run."""
_LONGEST = 8 * 1024
_MARK = b"\x1e"
_ESCAPES = re.compile(r"\x1b\[[0-9;?]*[ -/]*[@-~]")
_UNPRINTABLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f]")
_TICK = timedelta(microseconds=1)


class _MarkedHandler(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        try:
            found = {"level": record.levelname, "text": self.format(record)}
            os.write(2, _MARK + json.dumps(found).encode() + b"\n")
        except (OSError, TypeError, ValueError):
            self.handleError(record)


def mark_records(level: int = logging.INFO) -> None:
    """Let all records of this process be told from what it prints; handlers that libraries have added go."""
    handler = _MarkedHandler()
    handler.setFormatter(logging.Formatter("%(name)s: %(message)s"))
    logging.basicConfig(level=level, handlers=[handler], force=True)
    for logger in logging.root.manager.loggerDict.values():
        if isinstance(logger, logging.Logger) and logger.handlers:
            logger.handlers, logger.propagate = [], True
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)


class AppLog:
    """The log of one run in one place."""

    def __init__(self, file: Path, max_bytes: int = MAX_BYTES) -> None:
        self._file = file
        self._max_bytes = max_bytes
        self._before = file.with_suffix(".before")
        self._last = datetime.min.replace(tzinfo=UTC)
        self._rest = b""

    def feed(self, data: bytes, task: str) -> list[LogLine]:
        """Take in what a process has written; an unfinished line waits. Returns the lines that were added."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        if len(self._rest) > _LONGEST:
            lines, self._rest = [*lines, self._rest], b""
        return self._add([line for raw in lines if (line := self._line(raw, task)) is not None])

    def flush(self, task: str) -> list[LogLine]:
        """The end of what was written."""
        return self.feed(b"\n", task) if self._rest else []

    def _line(self, raw: bytes, task: str) -> LogLine | None:
        level, text = "", raw.decode(errors="replace")
        if raw.startswith(_MARK):
            try:
                found = json.loads(raw[1:])
                level, text = str(found["level"]), str(found["text"])
            except (ValueError, KeyError, TypeError):
                pass  # somebody else prints this mark
        text = _UNPRINTABLE.sub("", _ESCAPES.sub("", text)).rstrip()
        if not text:
            return None
        self._last = max(datetime.now(UTC), self._last + _TICK)
        cut = text if len(text) <= _LONGEST else f"{text[:_LONGEST]} ... ({len(text)} characters)"
        return LogLine(at=self._last, level=level, task=task, text=cut)

    def _add(self, lines: list[LogLine]) -> list[LogLine]:
        if lines:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            if self._file.exists() and self._file.stat().st_size > self._max_bytes:
                self._file.replace(self._before)
            with self._file.open("ab") as file:
                file.writelines(line.model_dump_json().encode() + b"\n" for line in lines)
        return lines

    def lines(self, after: datetime | None = None) -> Iterator[LogLine]:
        """What is kept, oldest first.

        Args:
            after: only what was written later.
        """
        for file in (self._before, self._file):
            try:
                texts = file.read_bytes().splitlines()
            except FileNotFoundError:
                continue
            for text in texts:
                try:
                    line = LogLine.model_validate_json(text)
                except ValidationError:
                    continue  # cut off by a crash
                if after is None or line.at > after:
                    yield line
