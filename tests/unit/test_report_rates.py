"""How many reports a sender may send."""

from __future__ import annotations

from fedtide.coordinator.log.report_rates import OF_NODES, UNIT_BYTES, ReportRates
from fedtide.fabric.nats.subjects import Report

NODE, OTHER, RUN = Report("eu", "n1", "x"), Report("eu", "n2", "x"), Report("hub", "run-1", "x")


def test_a_month_of_reports_at_once_is_taken_and_a_flood_is_not() -> None:
    rates = ReportRates()
    assert not any(rates.why_too_many(NODE, 300, 0.0) for _ in range(int(OF_NODES.burst)))
    assert "n1 reports more than" in (rates.why_too_many(NODE, 300, 0.0) or "")
    assert rates.why_too_many(OTHER, 300, 0.0) is None and rates.why_too_many(RUN, 300, 0.0) is None
    later = 10.0
    assert not any(rates.why_too_many(NODE, 300, later) for _ in range(int(OF_NODES.per_s * later)))
    assert rates.why_too_many(NODE, 300, later) is not None


def test_large_reports_count_by_their_bytes() -> None:
    rates, size = ReportRates(), 256 * 1024
    taken = sum(rates.why_too_many(NODE, size, 0.0) is None for _ in range(100))
    assert taken == int(OF_NODES.burst * UNIT_BYTES / size)
    assert rates.why_too_many(NODE, 100, 0.0) is None, "a small one still fits"


def test_senders_that_are_quiet_are_forgotten() -> None:
    rates = ReportRates()
    for number in range(5_000):
        rates.why_too_many(Report("eu", f"n{number}", "x"), 300, float(number))
    assert len(rates._left) < 1_500
