"""Maintenance windows: times of the week, in a given time zone. Pure."""

from __future__ import annotations

from datetime import UTC, datetime, time, timedelta
from typing import Literal
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from pydantic import Field, field_validator

from fedtide.fabric.strict import Strict

Day = Literal["mon", "tue", "wed", "thu", "fri", "sat", "sun"]
DAYS: tuple[Day, ...] = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")


class Window(Strict):
    """From `start` to `end` by the wall clock; over midnight if `end` is not later than `start`."""

    start: time = Field(description="Wall clock time, e.g. 22:00")
    end: time = Field(description="Wall clock time; not later than `start`: on the next day")
    days: list[Day] = Field(default=list(DAYS), min_length=1, description="Days on which it starts")
    timezone: str | None = Field(default=None, description="None: that of the node")

    @field_validator("timezone")
    @classmethod
    def _known(cls, value: str | None) -> str | None:
        if value is not None:
            zone(value)
        return value


def zone(name: str) -> ZoneInfo:
    """Raises ValueError for a name that the time zone database does not have."""
    try:
        return ZoneInfo(name)
    except (ZoneInfoNotFoundError, ValueError, OSError) as exc:
        raise ValueError(f"{name!r} is no time zone; write it like Europe/Berlin") from exc


def _zone_of_node(name: str) -> ZoneInfo:
    """What a node says of itself may be wrong, or of a newer time zone database: then its windows are in UTC."""
    try:
        return zone(name)
    except ValueError:
        return ZoneInfo("UTC")


def is_open(window: Window, at: datetime, local: str = "UTC") -> bool:
    """Whether `at` lies in the window, for a node whose time zone is `local`."""
    return any(start <= at < end for start, end in openings(window, at, local))


def opening(window: Window, at: datetime, local: str = "UTC") -> datetime:
    """When the window opened, if it is open at `at`; otherwise when it opens next."""
    around = openings(window, at, local)
    return next((start for start, end in around if start <= at < end), None) or opens_at(window, at, local)


def opens_at(window: Window, at: datetime, local: str = "UTC") -> datetime:
    """`at` if the window is open, else when it opens next."""
    if is_open(window, at, local):
        return at
    return min(start for start, _ in openings(window, at, local) if start > at)


def openings(window: Window, at: datetime, local: str = "UTC") -> list[tuple[datetime, datetime]]:
    """The openings from yesterday's to one in eight days, in UTC: when each begins and ends."""
    where = zone(window.timezone) if window.timezone is not None else _zone_of_node(local)
    today = at.astimezone(where).date()
    found = []
    for offset in range(-1, 9):
        day = today + timedelta(days=offset)
        if DAYS[day.weekday()] not in window.days:
            continue
        last = day if window.end > window.start else day + timedelta(days=1)
        start = datetime.combine(day, window.start, where).astimezone(UTC)
        found.append((start, datetime.combine(last, window.end, where).astimezone(UTC)))
    return found
