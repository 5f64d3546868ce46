"""Arithmetic of times that cannot fail. Pure."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

END_OF_TIME = datetime.max.replace(tzinfo=UTC)


def later(at: datetime, seconds: float) -> datetime:
    """`seconds` after `at`, or the last time that Python knows: who asks for 1e300 seconds means never."""
    try:
        return at + timedelta(seconds=seconds)
    except OverflowError:
        return END_OF_TIME
