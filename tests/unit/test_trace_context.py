"""W3C trace context: what is read, what is refused, and that ids of one name are the same everywhere."""

from __future__ import annotations

import logging

import pytest

from fedtide.fabric.logs import FieldFormatter
from fedtide.fabric.trace_context import Origin, TraceContext, current, of_answer, within

TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


@pytest.mark.parametrize(("flags", "sampled"), [("01", True), ("00", False), ("03", True)])
def test_a_traceparent_is_read_and_written(flags: str, sampled: bool) -> None:
    context = TraceContext.parse(f" 00-{TRACE}-{SPAN}-{flags}")
    assert context == TraceContext(TRACE, SPAN, sampled)
    assert str(context) == f"00-{TRACE}-{SPAN}-0{int(sampled)}"


def test_a_later_version_is_read_as_far_as_it_is_known() -> None:
    assert TraceContext.parse(f"cc-{TRACE}-{SPAN}-01-what-the-future-will-be-like") == TraceContext(TRACE, SPAN)


@pytest.mark.parametrize(
    "text",
    [
        "",
        None,
        7,
        f"ff-{TRACE}-{SPAN}-01",
        f"00-{TRACE}-{SPAN}-01-more",
        f"00-{'0' * 32}-{SPAN}-01",
        f"00-{TRACE}-{'0' * 16}-01",
        f"00-{TRACE.upper()}-{SPAN}-01",
        f"00-{TRACE}-{SPAN}",
        f"00-{TRACE[1:]}-{SPAN}-01",
    ],
)
def test_what_is_none_is_not_passed_on(text: object) -> None:
    assert TraceContext.parse(text) is None


def test_everybody_comes_to_the_same_ids_and_no_two_things_share_one() -> None:
    run = Origin("run-1", "cli").context
    assert run == Origin("run-1", "api").context and Origin("run-1", "cli").parent is None
    spans = {of_answer(run, r, t, p, n).span for r in (1, 2) for t in (1, 2) for p in ("train", "x") for n in "ab"}
    assert len(spans) == 16 and run.span not in spans
    assert run.child("a").child("b") != run.child("b")


def test_a_trace_that_came_from_outside_goes_on_and_one_that_is_not_kept_there_is_not_kept_here() -> None:
    origin = Origin("run-1", "trigger drift", f"00-{TRACE}-{SPAN}-00")
    assert origin.firing is not None and origin.firing.trace == origin.context.trace == TRACE
    assert not origin.context.sampled and origin.context.span != origin.firing.span != SPAN


def test_log_lines_name_the_span_that_they_are_of() -> None:
    record = logging.makeLogRecord({"msg": "task.training", "task": "t-1"})
    line = FieldFormatter("%(message)s")
    assert line.format(record) == "task.training task=t-1"
    with within(TraceContext(TRACE, SPAN)):
        assert line.format(record) == f"task.training task=t-1 trace_id={TRACE} span_id={SPAN}"
    assert current() is None
