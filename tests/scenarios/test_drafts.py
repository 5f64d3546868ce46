"""Drafts: changes are seen through them, and by nobody else before they count."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from fedtide.coordinator import reducers
from fedtide.coordinator.drafts import Draft
from fedtide.coordinator.state import World
from fedtide.fabric.events.envelope import NodeOnline
from tests.scenarios.build import Story, apply, joined, requested

CHANGES = st.lists(st.tuples(st.sampled_from("abcde"), st.none() | st.integers(0, 9)), max_size=12)


def _change(table: Draft[str, int] | dict[str, int], changes: list[tuple[str, int | None]]) -> None:
    for key, value in changes:
        if value is None:
            table.pop(key, None)
        else:
            table[key] = value


@given(CHANGES, CHANGES, CHANGES)
def test_a_draft_is_the_changed_table_and_the_table_is_not_changed(
    first: list[tuple[str, int | None]], second: list[tuple[str, int | None]], third: list[tuple[str, int | None]]
) -> None:
    table: dict[str, int] = {}
    _change(table, first)
    before, wanted = dict(table), dict(table)
    outer = Draft(table)
    inner = Draft(outer)
    for draft, changes in ((outer, second), (inner, third)):
        _change(draft, changes)
        _change(wanted, changes)
        assert list(draft.items()) == list(wanted.items()) and len(draft) == len(wanted)
        assert all((key in draft) == (key in wanted) for key in "abcde")
    assert table == before
    inner.commit()
    outer.commit()
    assert list(table.items()) == list(wanted.items())


def test_a_world_changes_with_the_commit_of_its_draft() -> None:
    story = Story()
    story.tell(joined("n1"))
    draft = story.world.draft()
    apply(draft, story.event(requested()))
    assert "run-1" in draft.runs and "run-1" not in story.world.runs
    draft.commit()
    assert "run-1" in story.world.runs


def test_every_type_of_event_has_a_reducer() -> None:
    from typing import get_args

    from fedtide.fabric.events.envelope import EventData

    union, _ = get_args(EventData)
    assert set(reducers.REDUCERS) == set(get_args(union))
    assert set(reducers.EFFECTS) == set(get_args(reducers.Effect))


def test_an_event_that_is_refused_changes_nothing() -> None:
    world, story = World(), Story()
    for data in (NodeOnline(node="n1"), joined("n1")):
        try:
            apply(world, story.event(data))
        except Exception:
            assert not world.nodes
    assert set(world.nodes) == {"n1"}
