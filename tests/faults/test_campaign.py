"""The seeded harness itself: its points, and a short campaign of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.campaign import campaign
from tests.faults.schedule import VICTIMS, points


def test_a_seed_gives_the_same_points_and_many_seeds_reach_every_victim() -> None:
    first = points(7, 50, ["eu"], ["eu-1"])
    assert first == points(7, 50, ["eu"], ["eu-1"])
    assert first[:10] == points(7, 10, ["eu"], ["eu-1"])
    assert first != points(8, 50, ["eu"], ["eu-1"])
    struck = {p.victim.split("-")[0] for seed in range(10) for p in points(seed, 50, ["eu"], ["eu-1"])}
    assert struck == set(VICTIMS)


@pytest.mark.slow
async def test_runs_under_faults_end_with_the_bytes_of_the_undisturbed_run(tmp_path: Path) -> None:
    assert await campaign(20, 4, tmp_path) == 0


@pytest.mark.slow
async def test_a_longer_campaign(tmp_path: Path) -> None:
    assert await campaign(21, 15, tmp_path) == 0
