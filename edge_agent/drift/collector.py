"""`python -m fedtide.edge_agent.drift.collector CONFIG.json`: sums the sketches of a region's nodes, once a window.

A process of its own, because nodes must not read each other's sketches. Only one index per
feature leaves the region, and only if enough nodes took part. The first good window of a release is
its reference.
"""

from __future__ import annotations

import asyncio
import json
import logging
import sys
from collections.abc import Awaitable, Callable
from contextlib import nullcontext
from pathlib import Path

from pydantic import Field, ValidationError

from fedtide.edge_agent.config import DriftLimits
from fedtide.edge_agent.drift.sketch import CONFIDENCE, PREDICTION, Sketch, pack, scores, total, unpack
from fedtide.fabric import logs
from fedtide.fabric.encoding import to_json
from fedtide.fabric.errors import ConfigError, FedtideError, MalformedMessage
from fedtide.fabric.events.envelope import DriftReported, Event
from fedtide.fabric.ids import unguessable
from fedtide.fabric.nats.broker import Broker
from fedtide.fabric.nats.credentials import Access
from fedtide.fabric.nats.jetstream import Received
from fedtide.fabric.nats.subjects import COLLECTOR, STAY, SketchOf, Subjects, parse_as
from fedtide.fabric.nats.urls import NatsUrl
from fedtide.fabric.nats.worker_meter import WorkerMeter
from fedtide.fabric.process.retry import Backoff, until_done
from fedtide.fabric.process.until_signalled import until_signalled
from fedtide.fabric.strict import Strict

log = logging.getLogger(__name__)

WINDOW_GRACE_SHARE = 0.2
"""How long after a window's first sketch to wait for those of other nodes, as a share of the window."""
LONGEST_WINDOW_S = 7 * 86_400.0

Report = Callable[[DriftReported, str], Awaitable[None]]


class RegionConfig(Strict):
    region: str
    nats_url: NatsUrl
    credentials: Path | None = None
    ca_file: Path | None = None


class CollectorConfig(Strict):
    """In a cluster each region has its own collector; on one machine one process serves all."""

    regions: list[RegionConfig]
    tenant: str = "default"
    limits: DriftLimits = Field(default=DriftLimits())


class Collector:
    """Sums the sketches of one region; `report` gets the results that may leave it."""

    def __init__(self, broker: Broker, subjects: Subjects, region: str, limits: DriftLimits, report: Report) -> None:
        self._broker = broker
        self._subjects = subjects
        self._region = region
        self._limits = limits
        self._report = report
        self._open: dict[tuple[str, int], asyncio.Task[None]] = {}

    async def listen(self) -> None:
        await self._broker.subscribe(self._subjects.drifts(self._region), self._on_sketch)

    async def _on_sketch(self, message: Received) -> None:
        sketch = parse_as(SketchOf, message.subject)
        model, window = sketch.model, sketch.window
        release, _, window_s = unpack(message.data)
        if not 0 < window_s <= LONGEST_WINDOW_S:
            raise MalformedMessage(f"{message.subject} is no window of {window_s} s")
        key = model, window
        if key not in self._open:
            task = self._open[key] = asyncio.create_task(self._close(model, window, release, window_s))
            task.add_done_callback(lambda _: self._open.pop(key, None))

    async def _close(self, model: str, window: int, release: str, window_s: float) -> None:
        await asyncio.sleep(WINDOW_GRACE_SHARE * window_s)
        try:
            await self._sum(model, window, release, window_s)
        except (FedtideError, ValueError) as exc:
            log.info("drift.window_lost", extra={"model": model, "window": window, "reason": str(exc)})

    async def _sum(self, name: str, window: int, release: str, window_s: float) -> None:
        left = await self._broker.last_of_each(
            STAY, self._subjects.drifts(self._region, name, window), domain=self._broker.streams_of(self._region)
        )
        same = [sketch for digest, sketch, _ in map(unpack, (m.data for m in left)) if digest == release]
        now = total(same)
        if len(same) < self._limits.min_nodes or now.samples < self._limits.min_samples:
            log.info("drift.too_few", extra={"model": name, "nodes": len(same), "samples": now.samples})
            return
        subject = self._subjects.drift_reference(self._region, name, release[:16])
        stored = await self._broker.last(STAY, subject, domain=self._broker.streams_of(self._region))
        reference = unpack(stored.data)[1] if stored is not None else now
        # Rewritten each time: messages of this stream expire after a week.
        await self._broker.publish(subject, pack(release, reference, window_s))
        if stored is not None:
            await self._tell(name, now, scores(now, reference), window)

    async def _tell(self, name: str, now: Sketch, found: dict[str, float], window: int) -> None:
        """One event each for the feature that moved most, the predictions, and the confidence."""
        outputs = {n: s for n, s in found.items() if n in (PREDICTION, CONFIDENCE)}
        features = {n: s for n, s in found.items() if n not in outputs}
        worst = max(features, key=features.__getitem__, default=None)
        for feature, score in {**outputs, **({worst: features[worst]} if worst is not None else {})}.items():
            if score < self._limits.report_above:
                continue
            data = DriftReported(
                region=self._region, model=name, feature=feature, score=round(score, 6), samples=now.samples
            )
            await self._report(data, f"{self._region}.drift.{name}.{feature}.{window}")


async def serve(config: CollectorConfig) -> None:
    """Collect for every region of `config` until cancelled; an unreachable region is retried."""
    meter = WorkerMeter()
    async with asyncio.TaskGroup() as group:
        for number, region in enumerate(config.regions):
            # One process: all that it uses is told in one of its regions.
            work = _keep(config, region, meter if number == 0 else None)
            group.create_task(work, name=f"collect-{region.region}")


async def _keep(config: CollectorConfig, region: RegionConfig, meter: WorkerMeter | None) -> None:
    backoff = Backoff()
    while True:
        try:
            await _collect(config, region, meter)
            backoff.reset()
        except FedtideError as exc:
            log.error("collector.waits", extra={"region": region.region, "reason": str(exc)})
        await backoff.wait()


async def _collect(config: CollectorConfig, region: RegionConfig, meter: WorkerMeter | None) -> None:
    subjects, access = Subjects(config.tenant), Access(region.credentials, region.ca_file)
    broker = await Broker.connect(region.nats_url, f"collector-{region.region}", access, wait_s=None)

    async def report(data: DriftReported, key: str) -> None:
        event = Event.now(f"collector/{region.region}", data, id=key)
        subject = subjects.report(region.region, COLLECTOR, "drift-reported")
        encoded, message_id = to_json(event), unguessable()
        await until_done(log, "collector.report_waits", lambda: broker.publish(subject, encoded, message_id=message_id))

    try:
        await Collector(broker, subjects, region.region, config.limits, report).listen()
        log.info("collector.ready", extra={"region": region.region})
        subject = subjects.telemetry(region.region, COLLECTOR)
        async with nullcontext() if meter is None else meter.telling(broker, subject):
            await broker.until_closed()
    finally:
        await broker.close()


def main() -> int:
    logs.to_stderr()
    try:
        config = CollectorConfig.model_validate(json.loads(Path(sys.argv[1]).read_bytes()))
    except (OSError, ValueError, ValidationError) as exc:
        print(f"fedtide drift collector: {ConfigError(sys.argv[1], str(exc))}", file=sys.stderr)
        return ConfigError.exit_code
    asyncio.run(until_signalled(serve(config)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
