"""`/metrics` of a node, in Prometheus' format: what it serves, how fast, and what it has used."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from aiohttp import web
from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import choose_encoder

from fedtide.edge_agent.serving.serving import Served, Serving
from fedtide.fabric.messages.usage import Usage

PATH = "/metrics"
BUCKETS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0)


@dataclass(frozen=True, slots=True)
class NodeState:
    """What else is told of a node. `used`: since the agent started."""

    ready: bool
    connected: bool
    training: bool
    used: Usage


class NodeMetrics:
    """Observes every request, and looks at the rest when it is asked."""

    def __init__(self, serving: Serving, state: Callable[[], NodeState]) -> None:
        self._serving = serving
        self._state = state
        self.registry = CollectorRegistry()
        about = "Seconds of a request in the model and its queue"
        self._seconds = Histogram(
            "fedtide_inference_seconds", about, ["model"], buckets=BUCKETS, registry=self.registry
        )
        about = "Requests with good inputs that the model failed on"
        self._failures = Counter("fedtide_inference_failures", about, ["model"], registry=self.registry)
        self.registry.register(self)

    def observe(self, served: Served) -> None:
        """One request (an observer of `Serving`)."""
        if served.outputs is None:
            self._failures.labels(served.model.name).inc()
        else:
            self._seconds.labels(served.model.name).observe(served.seconds)

    def collect(self) -> Iterator[Metric]:
        """What is looked at (prometheus_client's interface of collectors)."""
        state = self._state()
        about = "1: it serves this version of the model"
        serves = GaugeMetricFamily("fedtide_node_serves", about, labels=["model", "version"])
        for name in self._serving.serving():
            model = self._serving.active(name)
            if model is not None:
                serves.add_metric([name, model.version], 1)
        yield serves
        yield _gauge("node_ready", "1: every model that it should serve is served", state.ready)
        yield _gauge("node_connected", "1: it has a connection to its region", state.connected)
        yield _gauge("node_training", "1: it has a task", state.training)
        used = state.used
        about = "CPU time of the agent; tasks report theirs with their answers"
        yield CounterMetricFamily("fedtide_node_cpu_seconds", about, value=used.cpu_us / 1e6)
        yield CounterMetricFamily("fedtide_node_received_bytes", "From its region", value=used.received_bytes)
        yield CounterMetricFamily("fedtide_node_sent_bytes", "To its region", value=used.sent_bytes)

    def routes(self) -> list[web.RouteDef]:
        return [web.get(PATH, self._show)]

    async def _show(self, request: web.Request) -> web.Response:
        encode, kind = choose_encoder(request.headers.get("Accept", ""))
        return web.Response(body=encode(self.registry), headers={"Content-Type": kind})


def _gauge(name: str, about: str, holds: bool) -> GaugeMetricFamily:
    return GaugeMetricFamily(f"fedtide_{name}", about, value=float(holds))
