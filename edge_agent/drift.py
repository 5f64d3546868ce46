"""Drift: this node's sketches into its region, and the region's sum against how it was. No central process.

At the end of a window every node leaves its sketch in the region's own stream. The first to take
the window's lease sums them. Sketches never leave the region; of the sum only an index a feature
does, and only if enough nodes took part. The first good window of a release is its reference.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Awaitable, Callable, Iterable
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from edge_agent.config import AgentConfig
from edge_agent.drift_sketch import CONFIDENCE, PREDICTION, Sketch, scores, total
from edge_agent.serving import Served
from edge_agent.sessions import Arrays, Model
from fabric.broker import Broker
from fabric.errors import MalformedMessage, StaleWriter, TransientError
from fabric.events import DriftReported
from fabric.subjects import STAY, Subjects
from fabric.tensors import Tensor, decode, encode

log = logging.getLogger(__name__)

GATHER = 256
GATHER_BYTES = 1024 * 1024
BEHIND = 8
"""Requests, and bytes of inputs, that are counted together, and such lots that may wait for it."""

Report = Callable[[DriftReported, str], Awaitable[None]]


class DriftWatch:
    """An observer of the serving, and a task that rests while nothing is asked of any model."""

    def __init__(self, config: AgentConfig, broker: Broker, report: Report) -> None:
        self._config = config
        self._broker = broker
        self._report = report
        self._subjects = Subjects(config.tenant)
        self._sketches: dict[str, tuple[Model, Sketch]] = {}
        self._pending: dict[str, list[Served]] = {}
        self._pending_bytes = 0
        self._behind = 0
        self._seen = asyncio.Event()
        self._counting = ThreadPoolExecutor(1, thread_name_prefix="drift")
        """Where sketches are touched: counting takes milliseconds, and no request waits for it."""

    def observe(self, served: Served) -> None:
        if served.outputs is None:
            return
        waiting = self._pending.setdefault(served.model.name, [])
        if waiting and waiting[0].model is not served.model:
            self._hand_over(served.model.name)
            waiting = self._pending.setdefault(served.model.name, [])
        waiting.append(served)
        self._pending_bytes += sum(a.nbytes for a in served.prepared.values())
        if len(waiting) >= GATHER or self._pending_bytes >= GATHER_BYTES:
            self._hand_over(served.model.name)
        self._seen.set()

    def _hand_over(self, name: str) -> None:
        self._pending_bytes = 0
        waiting = self._pending.pop(name)
        if self._behind < BEHIND:  # a sample of the requests says as much
            self._behind += 1
            self._counting.submit(self._count, name, waiting)

    def _count(self, name: str, waiting: list[Served]) -> None:
        self._behind -= 1
        model = waiting[0].model
        known = self._sketches.get(name)
        if known is None or known[0].release != model.release:
            known = self._sketches[name] = (model, Sketch())
        for alike in _alike(waiting):
            inputs = _joined([served.prepared for served in alike])
            outputs = _joined([served.outputs or {} for served in alike])
            known[1].add(inputs, outputs, model.manifest.export.scoring)

    async def run(self) -> None:
        """Window after window, for ever; without requests there is no window."""
        width = self._config.drift.window_s
        async with asyncio.TaskGroup() as group:
            while True:
                await self._seen.wait()
                window = int(time.time() // width)
                await asyncio.sleep((window + 1) * width - time.time())
                self._seen.clear()
                for name in [*self._pending]:
                    self._hand_over(name)
                done = await asyncio.get_running_loop().run_in_executor(self._counting, self._take)
                for name, (model, sketch) in done.items():
                    group.create_task(self._close(name, model, sketch, window), name=f"drift-{name}")

    def _take(self) -> dict[str, tuple[Model, Sketch]]:
        done, self._sketches = self._sketches, {}
        return done

    async def _close(self, name: str, model: Model, sketch: Sketch, window: int) -> None:
        region, width = self._config.region, self._config.drift.window_s
        subject = self._subjects.drift(region, self._config.node, name, window)
        lease = self._subjects.shared(region, f"drift-lease.{name}.{window}")
        try:
            await self._broker.publish(subject, _pack(model, sketch), ttl_s=4 * width)
            await asyncio.sleep(0.2 * width)  # until the others have left theirs
            try:
                await self._broker.publish(lease, b"", expected_last_of_subject=0, ttl_s=4 * width)
            except StaleWriter:
                return  # another node sums this window
            await self._sum(name, model, window)
        except (TransientError, MalformedMessage, ValueError) as exc:
            log.info("drift.window_lost", extra={"model": name, "window": window, "reason": str(exc)})

    async def _sum(self, name: str, model: Model, window: int) -> None:
        region, limits = self._config.region, self._config.drift
        left = await self._broker.last_of_each(STAY, self._subjects.drifts(region, name, window))
        mine = [sketch for release, sketch in map(_unpack, (m.data for m in left)) if release == model.release.digest]
        now = total(mine)
        if len(mine) < limits.min_nodes or now.samples < limits.min_samples:
            log.info("drift.too_few", extra={"model": name, "nodes": len(mine), "samples": now.samples})
            return
        subject = self._subjects.shared(region, f"drift-reference.{name}.{model.release.digest[:16]}")
        stored = await self._broker.last(STAY, subject)
        reference = _unpack(stored.data)[1] if stored is not None else now
        # Written anew each time: what stands in this stream ends after a week.
        await self._broker.publish(subject, _pack(model, reference))
        if stored is not None:
            await self._tell(name, now, scores(now, reference), window)

    async def _tell(self, name: str, now: Sketch, found: dict[str, float], window: int) -> None:
        """One event each for the feature that moved most, the predictions, and the confidence."""
        outputs = {n: s for n, s in found.items() if n in (PREDICTION, CONFIDENCE)}
        features = {n: s for n, s in found.items() if n not in outputs}
        worst = max(features, key=features.__getitem__, default=None)
        for feature, score in {**outputs, **({worst: features[worst]} if worst is not None else {})}.items():
            if score < self._config.drift.report_above:
                continue
            data = DriftReported(
                region=self._config.region, model=name, feature=feature, score=round(score, 6), samples=now.samples
            )
            await self._report(data, f"{name}.{feature}.{window}")


def _alike(waiting: list[Served]) -> Iterable[list[Served]]:
    """Requests that can be joined along their first axis; others each for itself."""
    if waiting[0].model.batchable:
        groups: dict[tuple[object, ...], list[Served]] = {}
        for served in waiting:
            groups.setdefault(tuple((n, a.shape[1:]) for n, a in served.prepared.items()), []).append(served)
        return groups.values()
    return [[served] for served in waiting]


def _joined(parts: list[Arrays]) -> Arrays:
    return parts[0] if len(parts) == 1 else {n: np.concatenate([part[n] for part in parts]) for n in parts[0]}


def _pack(model: Model, sketch: Sketch) -> bytes:
    about = np.frombuffer(json.dumps([model.release.digest, sketch.samples]).encode(), np.uint8)
    tensors = [Tensor.of("about", about), *(Tensor.of(f"h.{n}", h) for n, h in sketch.histograms.items())]
    return b"".join(encode(tensors))


def _unpack(raw: bytes) -> tuple[str, Sketch]:
    """The digest of the release, and the sketch; raises MalformedMessage."""
    tensors = {t.name: t.numpy() for t in decode(raw)}
    try:
        digest, samples = json.loads(tensors.pop("about").tobytes())
    except (KeyError, ValueError) as exc:
        raise MalformedMessage("this is no sketch") from exc
    return str(digest), Sketch({n.removeprefix("h."): h for n, h in tensors.items()}, int(samples))
