"""`/metrics` in Prometheus' text format: what the world holds now, and what this process has done."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from datetime import UTC, datetime

from aiohttp import web
from prometheus_client import CollectorRegistry, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import choose_encoder

from fedtide.coordinator.adapters.presence import Presence
from fedtide.coordinator.api.routes import TEXT, Route, get
from fedtide.coordinator.executor import Executor
from fedtide.coordinator.fleet.views import SKEW_S
from fedtide.coordinator.log.engine import Engine
from fedtide.coordinator.log.parked import ParkedReports
from fedtide.coordinator.rollouts import rollouts
from fedtide.coordinator.runs import runs
from fedtide.coordinator.storage.housekeeping import Housekeeping
from fedtide.fabric.events.envelope import Event
from fedtide.fabric.events.rollouts import NodePhaseReported
from fedtide.fabric.events.runs import RoundClosed
from fedtide.fabric.messages.trust import REFUSAL_KINDS
from fedtide.fabric.trace_context import TraceContext, of_offer


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
        about = "What nodes did not follow, by why"
        refused = CounterMetricFamily("fedtide_orders_refused", about, labels=["kind"])
        counts: Counter[str] = Counter()
        for node in world.nodes.values():
            counts.update(node.refused)
        for kind in REFUSAL_KINDS:
            refused.add_metric([kind], counts[kind])
        yield refused
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


class Timings:
    """How long things took, as this process has seen them end. What is traced leaves its trace as an exemplar."""

    def __init__(self, engine: Engine, registry: CollectorRegistry, *, traced: bool) -> None:
        self._engine = engine
        self._traced = traced
        about = "Seconds from the first task of a round to its close"
        self._rounds = Histogram("fedtide_round_seconds", about, buckets=ROUND_BUCKETS, registry=registry)
        about = "Seconds from a node's offer of a release until it serves it"
        self._activations = Histogram("fedtide_activation_seconds", about, buckets=ROUND_BUCKETS, registry=registry)

    async def keep(self) -> None:
        """For ever."""
        await self._engine.show(self._observe)

    def _observe(self, event: Event) -> None:
        match event.data:
            case RoundClosed(run=key, seconds=seconds) if (run := self._engine.world.runs.get(key)) is not None:
                self._rounds.observe(seconds, self._exemplar(run.facts.origin.context))
            case NodePhaseReported(phase="confirmed", rollout=key, node=node, counter=counter):
                rollout = self._engine.world.rollouts.get(key)
                known = rollouts.nodes_of(rollout).get(node) if rollout is not None else None
                if rollout is not None and known is not None and known.counter == counter:
                    context = of_offer(rollout.facts.origin.context, node, counter)
                    seconds = (event.time - known.offered_at).total_seconds()
                    self._activations.observe(max(0.0, seconds), self._exemplar(context))

    def _exemplar(self, context: TraceContext) -> dict[str, str] | None:
        return {"trace_id": context.trace, "span_id": context.span} if self._traced else None


ROUND_BUCKETS = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1800, 3600)


def _gauge(name: str, about: str, *labels: str, value: float | None = None) -> GaugeMetricFamily:
    return GaugeMetricFamily(f"fedtide_{name}", about, value=value, labels=labels or None)


def routes(registry: CollectorRegistry) -> list[Route]:
    async def show(request: web.Request) -> web.Response:
        """In OpenMetrics, which has exemplars, for those who ask for it."""
        encode, kind = choose_encoder(request.headers.get("Accept", ""))
        return web.Response(body=encode(registry), headers={"Content-Type": kind})

    return [get("/metrics", show, "Metrics in Prometheus' format", media=TEXT, is_open=True)]
