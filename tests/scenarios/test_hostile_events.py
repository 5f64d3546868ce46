"""Whatever a report says, in whatever state the world is: it is applied or refused, and no reducer fails."""

from __future__ import annotations

import random
from datetime import UTC, datetime

import pytest

from fedtide.coordinator.log.reports import why_unbounded
from fedtide.coordinator.state import World
from fedtide.fabric.errors import FedtideError, InvalidTransition, MalformedMessage
from fedtide.fabric.events.envelope import Event, decode_event
from fedtide.fabric.plans.windows import Window, is_open
from tests.compat.test_old_and_new_talk import CORPUS, NEWEST
from tests.hostile import with_a_value_replaced
from tests.scenarios.build import Story, apply, produced, requested


def _hostile(line: bytes, rng: random.Random) -> Event | None:
    """A hurt event as it gets past the intake; None if it does not."""
    for _ in range(rng.choice((1, 1, 2))):
        line = with_a_value_replaced(line, rng)
    try:
        event = decode_event(line)
    except MalformedMessage:
        return None
    return None if why_unbounded(event) else event.model_copy(update={"decided": ""})


@pytest.mark.parametrize("rounds", [pytest.param(4, id="few"), pytest.param(300, id="many", marks=pytest.mark.slow)])
@pytest.mark.timeout(1800)
def test_no_reducer_fails(rounds: int) -> None:
    lines = (CORPUS / NEWEST / "events.jsonl").read_bytes().splitlines()
    world, rng, applied, refused = World(), random.Random(1), 0, 0
    for line in lines:
        for other in rng.choices(lines, k=4 * rounds):
            event = _hostile(other, rng)
            if event is None:
                continue
            draft = world.draft()
            try:
                apply(draft, event)
                for commands in draft.pending_commands():
                    assert commands is not None
                applied += 1
            except InvalidTransition:
                refused += 1
            except FedtideError as exc:
                raise AssertionError(f"{exc!r} for {event!r}") from exc
        apply(world, decode_event(line))
    assert applied > 50 and refused > 10


@pytest.mark.parametrize("name", ["", "a.b.>", "x" * 100, "m\n", "../m"])
def test_a_model_with_a_name_that_is_none_is_refused(name: str) -> None:
    story = Story()
    story.tell(requested())
    with pytest.raises(InvalidTransition, match="names the model"):
        story.tell(produced().model_copy(update={"model": name}))
    assert not story.world.models


def test_a_run_produces_the_model_that_was_asked_for_and_no_other() -> None:
    story = Story()
    story.tell(requested(model="mine"))
    with pytest.raises(InvalidTransition, match="not 'mine'"):
        story.tell(produced().model_copy(update={"model": "yours"}))


def test_a_node_in_a_time_zone_that_does_not_exist_has_its_windows_in_utc() -> None:
    window = Window.model_validate({"start": "00:00", "end": "01:00"})
    assert is_open(window, datetime(2026, 1, 1, 0, 30, tzinfo=UTC), "Not/AZone")
    assert not is_open(window, datetime(2026, 1, 1, 2, 30, tzinfo=UTC), "Not/AZone")
