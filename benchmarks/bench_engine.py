"""Events through the engine against a real nats-server: many at once, and one at a time.

The peer is the same engine with one append an event, as before it appended what is queued as one batch.
Both are measured in turn, on one server, several times.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Iterator

from benchmarks.hub import hub
from benchmarks.report import Row, load_now, write
from fedtide.coordinator.adapters.topology import Topology
from fedtide.coordinator.log.engine import BATCH_FROM, Engine
from fedtide.coordinator.log.event_log import EventLog
from fedtide.coordinator.log.snapshots import Snapshots
from fedtide.fabric.events.envelope import CoordinatorElected, EventData
from fedtide.fabric.events.runs import RoundClosed, RoundCollected, RoundOpened, RunRequested, UpdateReceived
from fedtide.fabric.nats.broker import Broker
from fedtide.fabric.nats.subjects import Subjects
from fedtide.fabric.plans.run_spec import AppRef, RunSpec
from fedtide.fabric.tensors.blobs import BlobRef

NODES, ROUNDS, SINGLE, TIMES = 50, 100, 1_000, 5
NEVER = 1_000_000


def story(run: str, rounds: int) -> Iterator[EventData]:
    """What a run of `rounds` rounds of `NODES` nodes reports."""
    app = AppRef(name="app", bundle=BlobRef(digest="a" * 64, size_bytes=10))
    yield RunRequested(run=run, spec=RunSpec(app=app))
    nodes = [f"n{i}" for i in range(NODES)]
    for number in range(1, rounds + 1):
        about = {"run": run, "attempt": 1, "round": number}
        yield RoundOpened.model_validate({**about, "phase": "train", "nodes": nodes, "bytes_down": 10})
        for node in nodes:
            yield UpdateReceived.model_validate({**about, "phase": "train", "node": node, "bytes_up": 5, "seconds": 1})
        collected = {**about, "phase": "train", "received": NODES, "cause": "all answered"}
        yield RoundCollected.model_validate(collected)
        yield RoundClosed.model_validate({**about, "metrics": {"loss": 0.5}, "seconds": 2.0})


async def _rates(url: str, batch_from: int) -> tuple[float, list[float]]:
    """Events a second, and the seconds that each of `SINGLE` events took alone."""
    broker = await Broker.connect(url, "bench")
    # A tenant of its own for each measurement would need streams of its own: the log only grows.
    engine = Engine(broker, Subjects(), EventLog(broker, Subjects()), Snapshots(broker, Subjects()), batch_from)
    await engine.take_over(CoordinatorElected(name="bench"))
    engine.lead(lambda _, __: None)
    running = asyncio.create_task(engine.run())
    events = list(story(f"run-{time.time_ns()}", ROUNDS))
    began = time.perf_counter()
    await asyncio.gather(*(engine.submit(data) for data in events))
    rate = len(events) / (time.perf_counter() - began)
    alone = []
    for data in list(story(f"run-{time.time_ns()}", SINGLE // NODES))[:SINGLE]:
        began = time.perf_counter()
        await engine.submit(data)
        alone.append(time.perf_counter() - began)
    running.cancel()
    await broker.close()
    return rate, alone


async def measure() -> list[Row]:
    rates: dict[bool, list[float]] = {True: [], False: []}
    p99: dict[bool, list[float]] = {True: [], False: []}
    with hub() as (url, _):
        broker = await Broker.connect(url, "bench")
        await Topology(broker, Subjects(), []).ensure_hub()
        await broker.close()
        for _ in range(TIMES):
            for together in (False, True):
                rate, alone = await _rates(url, BATCH_FROM if together else NEVER)
                rates[together].append(rate)
                p99[together].append(1000 * statistics.quantiles(alone, n=100)[98])
    peer = "one append an event"
    note = f"{ROUNDS} rounds of {NODES} nodes, median of {TIMES}"
    many, alone = ([statistics.median(found[together]) for together in (True, False)] for found in (rates, p99))
    return [
        Row("engine", "many at once", "events/s", *many, peer, note),
        Row("engine", "one at a time, p99", "ms", *alone, peer),
    ]


def main() -> None:
    load = load_now()
    write("engine", load, asyncio.run(measure()))


if __name__ == "__main__":
    main()
