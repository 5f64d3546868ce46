"""Metrics of processes that Prometheus does not reach: aggregators, which are gone before it comes, and workers of
regions, which have no port. Made of what they tell anyway.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from fedtide.coordinator.log.engine import Engine
from fedtide.fabric.events.envelope import DriftReported, Event
from fedtide.fabric.events.runs import (
    AggregatorExited,
    RoundClosed,
    RunCompleted,
    RunFailed,
    UpdateReceived,
    UpdateRefused,
)
from fedtide.fabric.messages.heartbeat import Heartbeat
from fedtide.fabric.messages.usage import Usage

SILENT_S = 120.0
"""A worker that was not heard for so long is down."""


class ProcessMetrics:
    """Since this coordinator leads: counters begin anew with each leader, as Prometheus expects of a new process."""

    def __init__(self, engine: Engine, registry: CollectorRegistry) -> None:
        self._engine = engine
        self._workers: dict[tuple[str, str], tuple[float, Heartbeat]] = {}
        about = "Answers of nodes to aggregators: `received`, or why one was refused"
        self._answers = Counter("fedtide_answers", about, ["outcome"], registry=registry)
        about = "CPU time of aggregators, with those of regions (their region; else `cloud`)"
        self._cpu = Counter("fedtide_aggregator_cpu_seconds", about, ["region"], registry=registry)
        about = "Bytes of messages that aggregators have received and sent"
        self._moved = Counter("fedtide_aggregator_bytes", about, ["region", "direction"], registry=registry)
        about = "Aggregators that have ended, by how: `ok`, `failed`, `preempted`"
        self._ended = Counter("fedtide_aggregators_ended", about, ["how"], registry=registry)
        about = "The last drift that a region has reported for a model, of the feature or output that moved most"
        self._drift = Gauge("fedtide_drift_score", about, ["region", "model"], registry=registry)
        registry.register(self)

    async def keep(self) -> None:
        """Count what comes, for ever."""
        await self._engine.show(self.observe)

    def observe(self, event: Event) -> None:
        """One event of the log."""
        match event.data:
            case UpdateReceived():
                self._answers.labels("received").inc()
            case UpdateRefused(category=category):
                self._answers.labels(category).inc()
            case RoundClosed(usage=usage, regional=regional):
                there = {name: used for name, used in regional.items() if self._engine.world.has_region(name)}
                self._used({**there, "cloud": usage})
            case RunCompleted(usage=usage) | RunFailed(usage=usage):
                self._used({"cloud": usage})
            case AggregatorExited(code=code, preempted=preempted):
                self._ended.labels("preempted" if preempted else "failed" if code else "ok").inc()
            case DriftReported(region=region, model=model, score=score) if model in self._engine.world.models:
                self._drift.labels(region, model).set(score)
            case _:
                pass

    def _used(self, by_region: Mapping[str, Usage]) -> None:
        for region, usage in by_region.items():
            self._cpu.labels(region).inc(usage.cpu_us / 1e6)
            self._moved.labels(region, "received").inc(usage.received_bytes)
            self._moved.labels(region, "sent").inc(usage.sent_bytes)

    def heard_worker(self, region: str, name: str, beat: Heartbeat) -> None:
        """A heartbeat of a drift collector or a regional aggregator."""
        self._workers[region, name] = time.monotonic(), beat

    def collect(self) -> Iterator[Metric]:
        """What is looked at (prometheus_client's interface of collectors)."""
        labels, now = ["region", "worker"], time.monotonic()
        about = f"1: a region's drift collector or regional aggregator was heard within {SILENT_S:g} s"
        up = GaugeMetricFamily("fedtide_worker_up", about, labels=labels)
        about = "CPU time of a region's worker since it started; of a regional aggregator without what it did for runs"
        cpu = CounterMetricFamily("fedtide_worker_cpu_seconds", about, labels=labels)
        for (region, name), (at, beat) in self._workers.items():
            up.add_metric([region, name], float(now - at < SILENT_S))
            cpu.add_metric([region, name], beat.used.cpu_us / 1e6)
        yield from (up, cpu)
