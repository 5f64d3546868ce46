"""Drift through a real broker: sketches stay in the region, an index leaves it, and only of enough nodes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedtide.edge_agent.config import DriftLimits
from fedtide.edge_agent.drift.collector import Collector
from fedtide.edge_agent.drift.recorder import DriftWatch
from fedtide.edge_agent.serving.serving import Served
from fedtide.edge_agent.serving.sessions import Model
from fedtide.fabric.events.envelope import DriftReported
from fedtide.fabric.nats.broker import Broker
from fedtide.fabric.nats.subjects import Subjects
from tests.served import config, model

SUBJECTS = Subjects()
WINDOW_S = 1.0


class Region:
    """Nodes that watch the same model; `reported` is what left the region."""

    def __init__(self, broker: Broker, served: Model, folder: Path, nodes: int) -> None:
        self.served = served
        self.reported: asyncio.Queue[DriftReported] = asyncio.Queue()
        limits = DriftLimits(min_nodes=3, min_samples=300, report_above=0.1)

        async def report(data: DriftReported, _: str) -> None:
            self.reported.put_nowait(data)

        self.collector = Collector(broker, SUBJECTS, "eu", limits, report)
        drift = {"window_s": WINDOW_S}
        self.watches = [DriftWatch(config(folder, node=f"n{i}", drift=drift), broker) for i in range(nodes)]

    def ask(self, rng: Any, mean: float, nodes: int | None = None) -> None:
        """Two hundred requests of each node, around `mean`."""
        for watch in self.watches[:nodes]:
            rows = rng.normal(mean, 1.0, (200, 3)).astype(np.float32)
            for row in rows:
                inputs = {"x": row[None, :]}
                watch.observe(Served(self.served, "", inputs, inputs, {"y": inputs["x"]}, 0.001))


@asynccontextmanager
async def watching(broker: Broker, folder: Path, nodes: int) -> AsyncIterator[Region]:
    region = Region(broker, model(folder), folder, nodes)
    await region.collector.listen()
    tasks = [asyncio.create_task(watch.run()) for watch in region.watches]
    yield region
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def _next_window() -> None:
    await asyncio.sleep(WINDOW_S - time.time() % WINDOW_S + 0.05)  # windows are times of the clock


async def test_a_shift_of_the_region_is_reported_by_the_feature_that_moved(at_leaf: Broker, tmp_path: Path) -> None:
    rng = np.random.default_rng(4)
    async with watching(at_leaf, tmp_path, 3) as region:
        for mean in (0.0, 0.0, 2.0):
            await _next_window()
            region.ask(rng, mean)
        async with asyncio.timeout(20):
            first = await region.reported.get()
        assert first.region == "eu"
        assert first.node == ""
        assert first.samples == 600
        assert first.score > 0.5


async def test_too_few_nodes_say_nothing(at_leaf: Broker, tmp_path: Path) -> None:
    rng = np.random.default_rng(4)
    async with watching(at_leaf, tmp_path, 2) as region:
        for mean in (0.0, 5.0):
            await _next_window()
            region.ask(rng, mean)
        await asyncio.sleep(2 * WINDOW_S)  # nothing comes: there is nothing to wait for
        assert region.reported.empty()


@pytest.mark.parametrize("batch", [1, 7])
def test_requests_are_counted_together_as_one_by_one(tmp_path: Path, batch: int) -> None:
    served = model(tmp_path)
    watch = DriftWatch(config(tmp_path), None)
    rng = np.random.default_rng(1)
    for _ in range(30):
        inputs = {"x": rng.normal(0, 1, (batch, 3)).astype(np.float32)}
        watch.observe(Served(served, "", inputs, inputs, {"y": inputs["x"]}, 0.001))
    watch._hand_over("scale")
    sketch = watch._counting.submit(watch._take).result()["scale"][1]
    assert sketch.samples == 30 * batch
    assert {int(h.sum()) for n, h in sketch.histograms.items() if n.startswith("x")} == {30 * batch}
