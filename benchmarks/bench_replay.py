"""Seconds from a coordinator's connection to its first action, on a long log: from a snapshot, and without one.

A real nats-server holds the log. The snapshot is as old as it can be: the next one is one event
away. The peer is this coordinator without snapshots: the whole log is replayed.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Iterator

from benchmarks.hub import hub
from benchmarks.report import Row, load_now, write
from fedtide.coordinator.adapters.topology import Topology
from fedtide.coordinator.commands import Commands
from fedtide.coordinator.log.engine import SNAPSHOT_EVERY, Engine
from fedtide.coordinator.log.event_log import EventLog
from fedtide.coordinator.log.snapshot_codec import Snapshot
from fedtide.coordinator.log.snapshots import Snapshots
from fedtide.fabric.events.envelope import Event, EventData, NodeJoined
from fedtide.fabric.events.runs import (
    AggregatorStarted,
    RoundClosed,
    RoundCollected,
    RoundOpened,
    RunCleanedUp,
    RunCompleted,
    RunRequested,
    UpdateReceived,
)
from fedtide.fabric.messages.heartbeat import Capabilities
from fedtide.fabric.nats.broker import Broker
from fedtide.fabric.nats.subjects import CONTROL, Subjects
from fedtide.fabric.plans.run_spec import AppRef, RunSpec
from fedtide.fabric.tensors.blobs import BlobRef

SIZES = (100_000, 1_000_000)
NODES = 20
ROUNDS = 10
TIMES = 3
WINDOW = 500
SUBJECTS = Subjects()


def main() -> None:
    load = load_now()
    rows = []
    for size in SIZES:
        with hub() as (url, _):
            ours, peer = asyncio.run(_measure(url, size))
        rows.append(Row(f"{size:,} events", "restart to first action", "s", ours, peer, "replay of the whole log"))
    write("replay", load, rows)


async def _measure(url: str, size: int) -> tuple[float, float]:
    """Seconds with a snapshot (median), and without."""
    broker = await Broker.connect(url, "bench")
    await Topology(broker, SUBJECTS, []).ensure_hub()
    events = _history()
    await _publish(broker, events, size - SNAPSHOT_EVERY + 1)
    await _save_snapshot(broker)
    await _publish(broker, events, SNAPSHOT_EVERY - 1)
    ours = [await _start(broker) for _ in range(TIMES)]
    await broker.purge(CONTROL, SUBJECTS.all_control)
    peer = await _start(broker)
    await broker.close()
    return statistics.median(ours), peer


def _history() -> Iterator[EventData]:
    """Runs of 20 nodes and 10 rounds, one after the other; the last one in any prefix is under way."""
    nodes = [f"node-{n:02d}" for n in range(NODES)]
    told = Capabilities(cpus=4, memory_bytes=8 << 30, disk_free_bytes=8 << 30, python="3.11", extras=["flwr"])
    for node in nodes:
        yield NodeJoined(node=node, region="eu", capabilities=told)
    app = AppRef(name="app", bundle=BlobRef(digest="a" * 64, size_bytes=1))
    number = 0
    while True:
        number += 1
        run = f"run-{number}"
        at = {"run": run, "attempt": 1}
        yield RunRequested(run=run, spec=RunSpec(app=app))
        yield AggregatorStarted(**at)
        for each in range(1, ROUNDS + 1):
            yield RoundOpened(**at, round=each, phase="train", nodes=nodes, bytes_down=1000)
            for node in nodes:
                yield UpdateReceived(**at, round=each, phase="train", node=node, bytes_up=50, seconds=0.5)
            yield RoundCollected(**at, round=each, phase="train", received=NODES, cause="all answered")
            yield RoundClosed(**at, round=each, metrics={"accuracy": 0.9}, seconds=1.0)
        yield RunCompleted(**at)
        yield RunCleanedUp(run=run)


async def _publish(broker: Broker, events: Iterator[EventData], count: int) -> None:
    for start in range(0, count, WINDOW):
        async with asyncio.TaskGroup() as group:
            for _ in range(min(WINDOW, count - start)):
                event = Event.now("bench", next(events))
                kind, _, name = event.data.kind.partition(".")
                group.create_task(broker.publish(SUBJECTS.event(kind, name), event.model_dump_json().encode()))


async def _save_snapshot(broker: Broker) -> None:
    log = EventLog(broker, SUBJECTS)
    engine = Engine(broker, SUBJECTS, log, Snapshots(broker, SUBJECTS), lambda _: None)
    await engine.catch_up()
    seen = [f"evt-{n:08x}" for n in range(100_000)]
    await Snapshots(broker, SUBJECTS).save(Snapshot(log.last, engine.applied, engine.world, seen))


async def _start(broker: Broker) -> float:
    began = time.monotonic()
    acted: list[float] = []

    def act(commands: Commands) -> None:
        if commands and not acted:
            acted.append(time.monotonic())

    engine = Engine(broker, SUBJECTS, EventLog(broker, SUBJECTS), Snapshots(broker, SUBJECTS), act)
    await engine.load()
    await engine.catch_up()
    engine.lead()
    return acted[0] - began


if __name__ == "__main__":
    main()
