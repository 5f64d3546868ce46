"""`/metrics` in Prometheus' text format: what the world holds now, and what this process has done."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from datetime import UTC, datetime

from aiohttp import web
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from fedtide.coordinator.adapters.presence import Presence
from fedtide.coordinator.api.routes import TEXT, Route, get
from fedtide.coordinator.executor import Executor
from fedtide.coordinator.fleet.views import SKEW_S
from fedtide.coordinator.log.engine import Engine
from fedtide.coordinator.log.parked import ParkedReports
from fedtide.coordinator.rollouts import rollouts
from fedtide.coordinator.runs import runs
from fedtide.coordinator.storage.housekeeping import Housekeeping


class WorldMetrics:
    """A Prometheus collector: it reads the world at every scrape and keeps nothing."""

    def __init__(
        self, engine: Engine, executor: Executor, parked: ParkedReports, housekeeping: Housekeeping, presence: Presence
    ) -> None:
        self._engine = engine
        self._executor = executor
        self._parked = parked
        self._housekeeping = housekeeping
        self._presence = presence

    def collect(self) -> Iterator[Metric]:
        yield from self._of_fleet()
        yield from self._of_work()
        yield from self._of_the_log()
        yield from self._of_stores()

    def _of_fleet(self) -> Iterator[Metric]:
        world = self._engine.world
        nodes = _gauge("nodes", "Nodes of the fleet", "region", "state")
        for (region, online), count in Counter((n.region, n.online) for n in world.nodes.values()).items():
            nodes.add_metric([region, "online" if online else "offline"], count)
        yield nodes
        skews = [abs(s) for name, s in self._presence.clock_ahead_s.items() if name in world.nodes]
        yield _gauge(
            "clock_skew_seconds", "By how much the clock of a node is off, at most", value=max(skews, default=0)
        )
        about = f"Nodes whose clocks are off by more than {SKEW_S:g} s"
        yield _gauge("nodes_skewed", about, value=sum(skew > SKEW_S for skew in skews))
        about = "Nodes of which two processes were heard"
        yield _gauge("nodes_twins", about, value=len(self._presence.twins))
        about = "Seconds until the credentials of a region's servers expire (fedtide fleet region)"
        left = _gauge("region_credentials_seconds", about, "region")
        for region, ends in world.identities.region_ends.items():
            left.add_metric([region], (ends - datetime.now(UTC)).total_seconds())
        yield left

    def _of_work(self) -> Iterator[Metric]:
        world = self._engine.world
        by_state = _gauge("runs", "Runs by state", "state")
        for state, count in Counter(type(r).__name__.lower() for r in world.runs.values()).items():
            by_state.add_metric([state], count)
        yield by_state
        yield _gauge("runs_open", "Runs not ended", value=sum(1 for _ in world.active_runs()))
        still_open = sum(rollouts.is_open(r) for r in world.rollouts.values())
        yield _gauge("rollouts_open", "Roll-outs not ended", value=still_open)
        yield _gauge("models", "Models in the registry", value=len(world.models))
        updates = sum(runs.accepted_updates(r) for r in world.runs.values())
        yield _gauge("updates_accepted", "Updates in closed rounds of all runs", value=updates)

    def _of_the_log(self) -> Iterator[Metric]:
        yield CounterMetricFamily("fedtide_events_applied", "Events applied", value=self._engine.applied)
        yield CounterMetricFamily("fedtide_events_refused", "Events refused", value=self._engine.refused)
        about = "Reports that could not be applied, and wait for a person (fedtide events parked)"
        yield _gauge("reports_parked", about, value=self._parked.count)
        about = "Reports that were not even parked, because their senders had too many parked"
        yield CounterMetricFamily("fedtide_reports_dropped", about, value=self._parked.dropped)
        about = "Events of the log that this version cannot apply"
        yield _gauge("events_left_out", about, value=len(self._engine.left_out))
        about = "Commands that could not be carried out, and wait for a person (fedtide events parked)"
        yield _gauge("commands_parked", about, value=len(self._executor.parked))

    def _of_stores(self) -> Iterator[Metric]:
        stored = _gauge("stream_bytes", "Bytes that a stream holds", "region", "stream")
        limits = _gauge("stream_limit_bytes", "Bytes that fit into it", "region", "stream")
        for place, level in self._housekeeping.levels.items():
            stored.add_metric([place.region, place.stream], level.bytes)
            limits.add_metric([place.region, place.stream], level.max_bytes)
        yield from (stored, limits)


def _gauge(name: str, about: str, *labels: str, value: float | None = None) -> GaugeMetricFamily:
    return GaugeMetricFamily(f"fedtide_{name}", about, value=value, labels=labels or None)


def routes(
    engine: Engine, executor: Executor, parked: ParkedReports, housekeeping: Housekeeping, presence: Presence
) -> list[Route]:
    registry = CollectorRegistry()
    registry.register(WorldMetrics(engine, executor, parked, housekeeping, presence))

    async def show(_: web.Request) -> web.Response:
        return web.Response(body=generate_latest(registry), headers={"Content-Type": "text/plain; version=0.0.4"})

    return [get("/metrics", show, "Metrics in Prometheus' format", media=TEXT, is_open=True)]
