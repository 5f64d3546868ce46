"""The audit trail: one entry that was changed, taken out or put in is found."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedtide.console.cli.audit_commands import cef
from fedtide.fabric.audit_chain import broken, sealed
from fedtide.fabric.messages.people import AuditEntry

AT = datetime(2026, 6, 1, 12, tzinfo=UTC)


def trail(count: int) -> list[AuditEntry]:
    found: list[AuditEntry] = []
    for number in range(1, count + 1):
        before = found[-1].hash if found else ""
        entry = AuditEntry(number=number, at=AT, who="al", action="POST /v1/runs", outcome="201", before=before)
        found.append(sealed(entry))
    return found


def test_a_whole_trail_is_whole_and_so_is_a_part_of_it() -> None:
    assert broken(trail(10)) is None
    assert broken(trail(10)[4:]) is None
    assert broken([]) is None


CHANGES: dict[str, Any] = {
    "who": "bo",
    "action": "DELETE /v1/nodes/n1",
    "outcome": "403",
    "at": datetime(2026, 6, 2, tzinfo=UTC),
    "origin": "203.0.113.7",
    "asked": "{}",
}


@pytest.mark.parametrize("field", CHANGES)
@given(place=st.integers(0, 9))
def test_a_change_of_one_entry_is_found(field: str, place: int) -> None:
    whole = trail(10)
    changed = whole[place].model_copy(update={field: CHANGES[field]})
    assert broken([*whole[:place], changed, *whole[place + 1 :]]) is not None
    if place < 9:  # also if its own hash is made to fit
        assert broken([*whole[:place], sealed(changed), *whole[place + 1 :]]) is not None


@given(place=st.integers(1, 8))
def test_what_was_taken_out_put_in_or_moved_is_found(place: int) -> None:
    whole = trail(10)
    assert broken([*whole[:place], *whole[place + 1 :]]) is not None
    assert broken([*whole[:place], whole[place], whole[place], *whole[place + 1 :]]) is not None
    assert broken([*whole[:place], whole[place + 1], whole[place], *whole[place + 2 :]]) is not None


def test_a_line_for_a_siem_holds_nothing_that_begins_another_field() -> None:
    entry = sealed(
        AuditEntry(
            number=7,
            at=AT,
            who="al=admin src=1.1.1.1\nCEF:0",
            action="POST /v1/a|b",
            outcome="403",
            behalf="cli\\x",
            before="",
        )
    )
    line = cef(entry)
    assert "\n" not in line
    head, fields = line[: line.index("rt=")], line[line.index("rt=") :]
    assert head == "CEF:0|fedtide|fedtide|1|POST|POST /v1/a\\|b|7|"
    assert "suser=al\\=admin src\\=1.1.1.1\\nCEF:0 " in fields
    assert "cs1=cli\\\\x " in fields
