"""Compares a candidate with its incumbent on one node during a roll-out; only counts leave the node.

Paired: both models answer the node's own recent labelled samples. Shadow: both answer a share of the
requests and are timed, in alternating order, off the request path.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress

import numpy as np

from fedtide.edge_agent.samples.store import Sample, SampleStore
from fedtide.edge_agent.serving.scoring import predictions, same, targets
from fedtide.edge_agent.serving.serving import Served
from fedtide.edge_agent.serving.sessions import Arrays, Model
from fedtide.fabric.errors import RemoteError
from fedtide.fabric.plans.rollout_plan import SLOWER, Desired, Measured

log = logging.getLogger(__name__)

SHADOWS = 64
"""Number of requests that may wait for shadowing; further ones are not shadowed."""

DOUBTFUL = 256
"""Number of failed requests that may wait for the incumbent's answer; further ones count as without one."""

Report = Callable[[Desired, Measured], Awaitable[None]]


class Comparison:
    """Counts for one desired state, from its activation until `run` is cancelled."""

    def __init__(
        self, desired: Desired, candidate: Model, incumbent: Model | None, samples: SampleStore, report: Report
    ) -> None:
        self.desired = desired
        self.candidate = candidate
        self.incumbent = incumbent
        self._samples = samples
        self._report = report
        self._counts: dict[str, float] = dict.fromkeys(Measured.model_fields, 0)
        self._shadows: asyncio.Queue[Arrays] = asyncio.Queue(maxsize=SHADOWS)
        self._doubtful: asyncio.Queue[Arrays] = asyncio.Queue(maxsize=DOUBTFUL)
        self._owed = 0.0
        self._changed = asyncio.Event()
        self._scored_until = 0.0

    def observe(self, served: Served) -> None:
        """Count a request that the candidate answered or failed on.

        A failure counts only if the incumbent answers the same request well (`_shadow`), or if there is none and
        the request holds finite numbers: what a client does wrong is no fault of a release.
        """
        if served.model is not self.candidate:
            return
        good = served.outputs is not None and _finite(served.outputs)
        if not good:
            self._failed(served.inputs)
            return
        self._counts["inferences"] += 1
        self._counts["latency_ms"] += served.seconds * 1000
        self._changed.set()
        self._owed += self.desired.terms.shadow
        if self._owed >= 1 and self.incumbent is not None and not self._shadows.full():
            self._owed -= 1
            self._shadows.put_nowait(served.inputs)

    def _failed(self, inputs: Arrays) -> None:
        if self.incumbent is None or self._doubtful.full():
            if _finite(inputs):
                self._count_error()
            return
        self._doubtful.put_nowait(inputs)

    def _count_error(self) -> None:
        self._counts["errors"] += 1
        self._changed.set()

    async def _judge(self) -> None:
        """Count the requests on which the candidate failed and the incumbent does not."""
        while True:
            inputs = await self._doubtful.get()
            assert self.incumbent is not None
            try:
                outputs = await asyncio.to_thread(self.incumbent.run, self.incumbent.prepare(inputs))
            except (RemoteError, ValueError):
                continue
            if _finite(outputs):
                self._count_error()

    def labels_came(self) -> None:
        self._changed.set()

    @property
    def measured(self) -> Measured:
        return Measured.model_validate(self._counts)

    async def run(self) -> None:
        """Score, shadow and report, at most for the roll-out's watch time; idle while nothing happens."""
        with suppress(TimeoutError):
            async with asyncio.timeout(self.desired.terms.watch_s), asyncio.TaskGroup() as group:
                group.create_task(self._shadow(), name="shadow")
                group.create_task(self._judge(), name="judge")
                group.create_task(self._report_changes(), name="measured")

    async def _report_changes(self) -> None:
        await self._score()
        await self._report(self.desired, self.measured)
        while True:
            await self._changed.wait()
            await asyncio.sleep(self.desired.terms.report_s)  # the report interval set by the coordinator
            self._changed.clear()
            await self._score()
            await self._report(self.desired, self.measured)

    async def _score(self) -> None:
        done = int(self._counts["wins"] + self._counts["losses"] + self._counts["ties"])
        left = self.desired.terms.holdout - done
        if self.incumbent is None or left <= 0:
            return
        since, self._scored_until = self._scored_until, time.time()
        samples = await asyncio.to_thread(self._samples.labelled, self.candidate.name, left, since)
        for sample in samples:
            await self._pair(sample)

    async def _pair(self, sample: Sample) -> None:
        assert self.incumbent is not None and sample.label is not None
        mine = await self._right(self.candidate, sample)
        theirs = await self._right(self.incumbent, sample)
        if mine is None or theirs is None:
            return
        self._counts["wins"] += int((mine & ~theirs).sum())
        self._counts["losses"] += int((theirs & ~mine).sum())
        self._counts["ties"] += int((mine == theirs).sum())

    async def _right(self, model: Model, sample: Sample) -> np.ndarray[tuple[int], np.dtype[np.bool_]] | None:
        """By row, whether a model is right; a model that fails on a sample is wrong. None: the label does not fit."""
        export = model.manifest.export
        rows = next(iter(sample.inputs.values())).shape[0] if sample.inputs else 0
        assert sample.label is not None
        try:
            wanted = targets(export, sample.label, rows)
        except RemoteError as exc:
            log.warning("sample.label_refused", extra={"sample": sample.id, "reason": str(exc)})
            return None
        try:
            outputs = await asyncio.to_thread(model.run, model.prepare(sample.inputs))
            return np.asarray(same(export.scoring, predictions(export.scoring, outputs), wanted))
        except (RemoteError, ValueError):
            return np.zeros(rows, dtype=np.bool_)

    async def _shadow(self) -> None:
        first = True
        while True:
            inputs = await self._shadows.get()
            first = not first
            try:
                await asyncio.to_thread(self._both, inputs, first)
            except (RemoteError, ValueError):
                self._counts["shadowed"] += 1
                self._counts["disagreed"] += 1

    def _both(self, inputs: Arrays, candidate_first: bool) -> None:
        assert self.incumbent is not None
        pair = [self.candidate, self.incumbent]
        took: dict[str, float] = {}
        said: dict[str, Arrays] = {}
        for model in pair if candidate_first else reversed(pair):
            ready = model.prepare(inputs)
            began = time.perf_counter()
            said[model.release.digest] = model.run(ready)
            took[model.release.digest] = time.perf_counter() - began
        mine, theirs = (m.release.digest for m in pair)
        scoring = self.candidate.manifest.export.scoring
        agree = same(scoring, predictions(scoring, said[mine]), predictions(scoring, said[theirs]))
        self._counts["shadowed"] += 1
        self._counts["disagreed"] += not bool(np.all(agree))
        self._counts["slower"] += took[mine] > SLOWER * took[theirs]


def _finite(arrays: Arrays) -> bool:
    return all(a.dtype.kind != "f" or bool(np.isfinite(a).all()) for a in arrays.values())
