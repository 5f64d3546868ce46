"""A whole fleet of nodes that only talk: bad models stop at their canaries, good ones reach everybody."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio

from fedtide.console import endpoints
from fedtide.fabric.messages.views import RolloutView
from fedtide.fabric.plans.rollout_request import RolloutRequest
from fedtide.fabric.validation import checked
from tests.integration.installation import until
from tests.integration.releases import graph, publish, smoke
from tests.simulated_fleet import Fleet, Quality, simulated_fleet

pytestmark = pytest.mark.asyncio(loop_scope="module")

GOOD = Quality(win=0.01, loss={"": 0.01})
FAILS_ON_A_TWENTIETH = Quality(win=0.0, loss={"": 0.05})
FAILS_ON_ONE_CLASS = Quality(win=0.01, loss={"": 0.01, "tiny": 0.3})
PLAN: dict[str, Any] = {
    "canary": 6,
    "gates": [{"kind": "paired", "slices": ["hardware"]}],
    "report_s": 0.1,
    "claim_deadline_s": 120,
    "gate_deadline_s": 120,
}


async def roll_out(fleet: Fleet, version: int, quality: Quality, seed: int, **plan: Any) -> RolloutView:
    """The view of a finished roll-out of a fresh version of this quality."""
    fleet.seed, fleet.quality[version] = seed, quality
    await publish(fleet.hub, version, graph(float(version)), smoke(float(version)))
    client = fleet.client

    def there() -> bool:
        return any(m.latest == version for m in client.every(endpoints.models()))

    await asyncio.to_thread(until, there, "the release")
    asked = checked(RolloutRequest, {"model": "scale", **plan})
    view = await asyncio.to_thread(client.send, endpoints.start_rollout(asked))

    def follow() -> RolloutView:
        *_, last = client.stream(endpoints.watch_rollout(view.rollout), timeout_s=200)
        return last

    return await asyncio.to_thread(follow)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def small(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Fleet]:
    async with simulated_fleet(tmp_path_factory.mktemp("fleet"), 2, 30) as fleet:
        await roll_out(fleet, 1, GOOD, 0, canary=0)
        yield fleet


async def test_a_good_model_reaches_every_node(small: Fleet) -> None:
    view = await roll_out(small, 2, GOOD, 1, **PLAN)
    assert view.state == "completed", view.reason
    assert len(small.confirmed[2]) == 60


@pytest.mark.parametrize(("version", "quality"), [(3, FAILS_ON_A_TWENTIETH), (4, FAILS_ON_ONE_CLASS)])
async def test_a_bad_model_is_stopped_at_its_canaries_and_taken_back(
    small: Fleet, version: int, quality: Quality
) -> None:
    view = await roll_out(small, version, quality, version, **PLAN)
    assert view.state == "rolledback", view.reason
    assert "paired" in view.reason
    assert len(small.confirmed[version]) <= 6


@pytest.mark.slow
@pytest.mark.timeout(3600)
async def test_rates_over_twenty_seeds_of_a_thousand_nodes(
    tmp_path_factory: pytest.TempPathFactory, capsys: pytest.CaptureFixture[str]
) -> None:
    kinds = {"good": GOOD, "fails on a twentieth": FAILS_ON_A_TWENTIETH, "fails on one class": FAILS_ON_ONE_CLASS}
    stopped = dict.fromkeys(kinds, 0)
    most = dict.fromkeys(kinds, 0)
    async with simulated_fleet(tmp_path_factory.mktemp("large"), 10, 100) as fleet:
        await roll_out(fleet, 1, GOOD, 0, canary=0, regions=[fleet.regions])
        version = 1
        for seed in range(1, 21):
            for kind, quality in kinds.items():
                version += 1
                view = await roll_out(fleet, version, quality, seed, **PLAN)
                confirmed = len(fleet.confirmed[version])
                most[kind] = max(most[kind], confirmed)
                stopped[kind] += view.state == "rolledback"
                with capsys.disabled():
                    print(f"seed {seed}, {kind}: {view.state}, {confirmed} nodes confirmed, {view.reason[:90]}")
    with capsys.disabled():
        print(f"stopped of 20: {stopped}; most nodes that confirmed: {most}")
    assert stopped == {"good": 0, "fails on a twentieth": 20, "fails on one class": 20}
    assert most["fails on a twentieth"] < 10
    assert most["fails on one class"] < 10
