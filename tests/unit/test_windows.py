"""Windows of time in which a node may train."""

from __future__ import annotations

from datetime import UTC, datetime

from fedtide.fabric.plans.windows import Window, is_open, opens_at


def _at(text: str) -> datetime:
    return datetime.fromisoformat(text).replace(tzinfo=UTC)


def test_a_window_over_midnight_belongs_to_the_day_on_which_it_starts() -> None:
    window = Window(start="22:00", end="04:00", days=["fri"])
    assert is_open(window, _at("2026-11-27 23:00"))  # a Friday
    assert is_open(window, _at("2026-11-28 03:59"))
    assert not is_open(window, _at("2026-11-28 04:00"))
    assert not is_open(window, _at("2026-11-27 03:00"))
    assert opens_at(window, _at("2026-11-28 05:00")) == _at("2026-12-04 22:00")


def test_a_window_follows_the_clock_of_its_zone_also_when_that_is_changed() -> None:
    window = Window(start="02:30", end="05:00", timezone="Europe/Berlin")
    assert opens_at(window, _at("2026-07-01 12:00")) == _at("2026-07-02 00:30")
    assert opens_at(window, _at("2026-12-01 12:00")) == _at("2026-12-02 01:30")
    assert is_open(Window(start="09:00", end="17:00"), _at("2026-01-05 00:30"), "Asia/Tokyo")
