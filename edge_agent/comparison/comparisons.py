"""The comparisons of candidates with incumbents on this node, at most one per model."""

from __future__ import annotations

import asyncio
import logging
from contextlib import suppress

from fedtide.edge_agent.comparison.comparison import Comparison, Report
from fedtide.edge_agent.samples.store import SampleStore
from fedtide.edge_agent.serving.serving import Served, Serving
from fedtide.edge_agent.serving.sessions import Model
from fedtide.fabric.plans.rollout_plan import Desired

log = logging.getLogger(__name__)


class Comparisons:
    """Observes the serving. A comparison keeps the incumbent loaded, so it ends as early as possible."""

    def __init__(self, serving: Serving, samples: SampleStore, report: Report) -> None:
        self._serving = serving
        self._samples = samples
        self._report = report
        self._running: dict[str, tuple[Comparison, asyncio.Task[None]]] = {}
        self._group: asyncio.TaskGroup | None = None

    async def run(self) -> None:
        """Run the comparisons, for ever."""
        async with asyncio.TaskGroup() as self._group:
            await asyncio.Event().wait()

    def begin(self, desired: Desired, candidate: Model, incumbent: Model | None) -> None:
        assert self._group is not None
        self.end(desired.model)
        comparison = Comparison(desired, candidate, incumbent, self._samples, self._report)
        task = self._group.create_task(self._until_over(comparison), name=f"compare-{desired.model}")
        self._running[desired.model] = (comparison, task)
        self._serving.keep(incumbent, desired.model)

    async def _until_over(self, comparison: Comparison) -> None:
        try:
            with suppress(asyncio.CancelledError):
                await comparison.run()
        except* Exception:  # no error of a comparison may stop the serving
            log.exception("comparison.ended")
        model = comparison.desired.model
        if model in self._running and self._running[model][0] is comparison:
            self.end(model)

    def end(self, model: str) -> None:
        """End a model's comparison: the roll-out needs no more counts of this node."""
        running = self._running.pop(model, None)
        if running is not None:
            running[1].cancel()
        self._serving.keep(None, model)

    def observe(self, served: Served) -> None:
        running = self._running.get(served.model.name)
        if running is not None:
            running[0].observe(served)

    def labels_came(self, model: str) -> None:
        if model in self._running:
            self._running[model][0].labels_came()
