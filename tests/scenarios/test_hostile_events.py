"""Whatever a report says, in whatever state the world is: it is applied or refused, and no reducer fails."""

from __future__ import annotations

import random

import pytest

from fedtide.coordinator import reducers
from fedtide.coordinator.log.reports import why_unbounded
from fedtide.coordinator.state import World
from fedtide.fabric.errors import FedtideError, InvalidTransition, MalformedMessage
from fedtide.fabric.events.envelope import Event, decode_event
from tests.compat.test_old_and_new_talk import CORPUS, NEWEST
from tests.hostile import with_a_value_replaced


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
                reducers.apply(draft, event)
                for commands in draft.pending_commands():
                    assert commands is not None
                applied += 1
            except InvalidTransition:
                refused += 1
            except FedtideError as exc:
                raise AssertionError(f"{exc!r} for {event!r}") from exc
        reducers.apply(world, decode_event(line))
    assert applied > 50 and refused > 10
