"""Metrics of processes that nobody scrapes, as Prometheus reads them."""

from __future__ import annotations

from types import SimpleNamespace

from prometheus_client import CollectorRegistry

from fedtide.coordinator.api.process_metrics import ProcessMetrics
from fedtide.fabric.events.envelope import DriftReported, Event, EventData
from fedtide.fabric.events.runs import AggregatorExited, RoundClosed, RunCompleted
from fedtide.fabric.messages.heartbeat import Heartbeat
from fedtide.fabric.messages.usage import Usage
from fedtide.fabric.nats.subjects import COLLECTOR
from tests.scenarios.build import received, refused

USED = Usage(cpu_us=2_000_000, received_bytes=100, sent_bytes=7)


def test_aggregators_and_workers_of_regions_are_told_from_what_they_say_anyway() -> None:
    registry = CollectorRegistry()
    world = SimpleNamespace(models={"m": None}, has_region=lambda name: name == "eu")
    metrics = ProcessMetrics(SimpleNamespace(world=world), registry)
    regional = dict.fromkeys(("eu", "made-up"), Usage(cpu_us=500_000))
    told: list[EventData] = [
        *(received(1, "a"), received(1, "b"), refused(1, "c", "late")),
        RoundClosed(run="r", attempt=1, round=1, metrics={}, seconds=1.0, usage=USED, regional=regional),
        RunCompleted(run="r", attempt=1, usage=USED),
        *(AggregatorExited(run="r", attempt=1, code=0), AggregatorExited(run="r", attempt=2, code=9, preempted=True)),
        *(DriftReported(region="eu", model=model, score=0.3) for model in ("m", "not a model of ours")),
    ]
    for data in told:
        metrics.observe(Event.now("test", data))
    metrics.heard_worker("eu", COLLECTOR, Heartbeat(used=Usage(cpu_us=1_500_000)))

    def value(name: str, **labels: str) -> float | None:
        return registry.get_sample_value(f"fedtide_{name}", labels)

    assert [value("answers_total", outcome=each) for each in ("received", "late")] == [2, 1]
    assert [value("aggregator_cpu_seconds_total", region=each) for each in ("cloud", "eu")] == [4, 0.5]
    assert value("aggregator_cpu_seconds_total", region="made-up") is None
    assert value("aggregator_bytes_total", region="cloud", direction="received") == 200
    assert [value("aggregators_ended_total", how=each) for each in ("ok", "failed", "preempted")] == [1, None, 1]
    assert value("drift_score", region="eu", model="m") == 0.3
    assert value("drift_score", region="eu", model="not a model of ours") is None, "a region cannot make up series"
    assert value("worker_up", region="eu", worker=COLLECTOR) == 1
    assert value("worker_cpu_seconds_total", region="eu", worker=COLLECTOR) == 1.5
