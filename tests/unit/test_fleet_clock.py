"""A node's idea of the fleet's time, and what the coordinator makes of a node's."""

from __future__ import annotations

import time

import pytest

from fedtide.coordinator.fleet import views
from fedtide.edge_agent.fleet_clock import FleetClock
from tests.scenarios.build import Story, joined


def test_the_clock_of_the_machine_counts_until_the_coordinator_has_told_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    wall, steady = 5_000.0, 10.0
    monkeypatch.setattr(time, "time", lambda: wall)
    monkeypatch.setattr(time, "monotonic", lambda: steady)
    clock = FleetClock()
    assert clock.now() == 5_000.0
    clock.told(1_000.0, waited_s=2.0)
    assert clock.now() == 1_001.0 and clock.own_ahead_s == 3_999.0
    steady += 60
    wall += 1_000_000  # somebody has set the machine's clock
    assert clock.now() == 1_061.0


@pytest.mark.parametrize(
    ("ahead", "twins", "said"),
    [
        (None, False, []),
        (2.0, False, []),
        (600.0, False, ["its clock is 600 s ahead"]),
        (-86_400.0, True, ["its clock is 86400 s behind", "two processes use its identity"]),
    ],
)
def test_a_wrong_clock_and_a_shared_identity_are_shown(ahead: float | None, twins: bool, said: list[str]) -> None:
    story = Story()
    story.tell(joined("a"))
    view = views.node(story.world.node("a"), None, ahead, twins=twins)
    assert len(view.warnings) == len(said)
    assert all(wanted in text for wanted, text in zip(said, view.warnings, strict=True))
