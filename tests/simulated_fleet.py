"""A fleet of nodes that only talk: the real protocol, real brokers and a real coordinator, made-up models.

Each node joins, takes what it is told to serve through its region's leaf, reports every phase, and
scores candidates on samples of its own that come over time: wins, losses and ties against what it
served before.
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

from fedtide.console import endpoints
from fedtide.console.client import Client
from fedtide.console.embedded import nats_config
from fedtide.console.embedded.plan import free_ports
from fedtide.fabric.encoding import from_json
from fedtide.fabric.errors import TransientError
from fedtide.fabric.events.envelope import Event, EventData, NodeJoined
from fedtide.fabric.events.rollouts import NodeMeasured, NodePhaseReported
from fedtide.fabric.messages.heartbeat import Capabilities
from fedtide.fabric.messages.views import StatusView
from fedtide.fabric.nats.broker import Broker
from fedtide.fabric.nats.jetstream import Received
from fedtide.fabric.nats.subjects import CACHE, OrderFor, Subjects, parse_as
from fedtide.fabric.nats.transfer import Source, read_blob
from fedtide.fabric.plans.release import ReleaseManifest, decode_release
from fedtide.fabric.plans.rollout_plan import Desired, Measured, NodePhase
from tests.conftest import NatsServer
from tests.hub import Hub
from tests.integration.installation import until

SUBJECTS = Subjects()
PHASES: tuple[NodePhase, ...] = ("downloading", "verified", "staged", "smoke_tested", "active", "confirmed")
SAMPLES_A_REPORT = 150
REPORTS = 8
REPORT_S = 0.1


@dataclass(frozen=True)
class Quality:
    """Chances a sample of wins and losses against the incumbent, by hardware class (`""`: any other)."""

    win: float
    loss: dict[str, float]

    def draw(self, rng: random.Random, hardware: str, n: int) -> tuple[int, int]:
        loss = self.loss.get(hardware, self.loss[""])
        drawn = rng.choices((1, -1, 0), (self.win, loss, 1 - self.win - loss), k=n)
        return drawn.count(1), drawn.count(-1)


@dataclass
class Fleet:
    """`quality` of versions is set by who publishes them; `confirmed` lists who ever confirmed which version."""

    client: Client
    hub: Hub
    regions: list[str]
    quality: dict[int, Quality] = field(default_factory=dict)
    confirmed: dict[int, set[str]] = field(default_factory=dict)
    _manifests: dict[tuple[str, str], ReleaseManifest] = field(default_factory=dict)
    _seen: dict[str, int] = field(default_factory=dict)
    seed: int = 0
    under_way: set[asyncio.Task[None]] = field(default_factory=set)


@dataclass
class Region:
    """All nodes of one region share a connection; each speaks on subjects of its own."""

    fleet: Fleet
    name: str
    broker: Broker
    nodes: dict[str, str]

    async def join(self) -> None:
        await self.broker.subscribe(f"{SUBJECTS.root}.live.node.{self.name}.>", self._on_live)
        async with asyncio.TaskGroup() as group:
            for node, hardware in self.nodes.items():
                told = Capabilities(cpus=1, memory_bytes=1, disk_free_bytes=1, python="3", hardware=hardware)
                joined = NodeJoined(node=node, region=self.name, capabilities=told)
                group.create_task(self._report(node, joined, f"{node}.joined"))

    async def _report(self, node: str, data: EventData, key: str) -> None:
        event = Event.now(f"agent/{node}", data, id=key)
        subject = SUBJECTS.report(self.name, node, data.kind.replace(".", "-"))
        while True:
            try:
                await self.broker.publish(subject, event.model_dump_json().encode(), message_id=key, timeout_s=60)
                return
            except TransientError:
                await asyncio.sleep(REPORT_S)  # as agents do: the region's streams may not be there yet

    async def _on_live(self, message: Received) -> None:
        order = parse_as(OrderFor, message.subject)
        if order.kind == "desired":
            node = order.node
            desired = from_json(Desired, message.data, "desired")
            if desired.counter > self.fleet._seen.get(node, 0):
                self.fleet._seen[node] = desired.counter
                task = asyncio.create_task(self._take(node, desired))
                self.fleet.under_way.add(task)
                task.add_done_callback(self.fleet.under_way.discard)

    async def _take(self, node: str, desired: Desired) -> None:
        version = await self._version(desired)
        for phase in PHASES:
            if self.fleet._seen[node] != desired.counter:
                return
            told = NodePhaseReported(rollout=desired.rollout, node=node, counter=desired.counter, phase=phase)
            await self._report(node, told, f"{node}.{desired.rollout}.{desired.counter}.{phase}")
        self.fleet.confirmed.setdefault(version, set()).add(node)
        if desired.terms.holdout:
            await self._measure(node, desired, self.fleet.quality[version])

    async def _measure(self, node: str, desired: Desired, quality: Quality) -> None:
        rng = random.Random(f"{self.fleet.seed}.{node}.{desired.counter}")
        wins = losses = n = 0
        for number in range(REPORTS):
            if self.fleet._seen[node] != desired.counter:
                return
            won, lost = quality.draw(rng, self.nodes[node], SAMPLES_A_REPORT)
            wins, losses, n = wins + won, losses + lost, n + SAMPLES_A_REPORT
            measured = Measured(inferences=n, wins=wins, losses=losses, ties=n - wins - losses)
            told = NodeMeasured(rollout=desired.rollout, node=node, counter=desired.counter, measured=measured)
            await self._report(node, told, f"{node}.{desired.rollout}.{desired.counter}.measured.{number}")
            await asyncio.sleep(REPORT_S)

    async def _version(self, desired: Desired) -> int:
        if desired.release is None:
            return 0
        known = self.fleet._manifests
        key = (self.name, desired.release.digest)
        if key not in known:
            source = Source(self.broker, CACHE)
            raw = await read_blob(source, lambda d: SUBJECTS.cache_blob(self.name, d), desired.release)
            known[key] = decode_release(bytes(raw))
        return known[key].version


def hardware_of(number: int) -> str:
    """Six in ten x86, three arm, one a small accelerator."""
    return ("x86", "x86", "arm", "x86", "x86", "arm", "x86", "arm", "x86", "tiny")[number % 10]


@asynccontextmanager
async def simulated_fleet(folder: Path, regions: int, nodes_per_region: int) -> AsyncIterator[Fleet]:
    """Hub, a leaf a region, a coordinator process, and nodes that have joined."""
    hub_port, leaf_listen, api_port, *leaf_ports = free_ports(3 + regions)
    names = [f"r{n}" for n in range(regions)]
    servers = [_server(folder / "hub.conf", nats_config.hub(hub_port, leaf_listen, folder / "hub"), hub_port)]
    for name, port in zip(names, leaf_ports, strict=True):
        text = nats_config.leaf(name, port, leaf_listen, folder / name)
        servers.append(_server(folder / f"{name}.conf", text, port))
    config = folder / "coordinator.json"
    told = {
        "nats_url": servers[0].url,
        "regions": names,
        "data_dir": str(folder / "coordinator"),
        "http_port": api_port,
        "warm_aggregator": False,
    }
    config.write_text(json.dumps(told))
    with (folder / "coordinator.log").open("w") as log:
        coordinator = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "fedtide.coordinator", str(config), stderr=log
        )
    client = Client.at(f"http://127.0.0.1:{api_port}", by="test")
    fleet = Fleet(client, Hub(servers[0].url), names)
    brokers: list[Broker] = []
    try:
        await asyncio.to_thread(until, lambda: _says(client, lambda s: True), "the coordinator")
        for name, server in zip(names, servers[1:], strict=True):
            brokers.append(await Broker.connect(server.url, f"fleet-{name}"))
            nodes = {f"{name}-{n}": hardware_of(n) for n in range(nodes_per_region)}
            await Region(fleet, name, brokers[-1], nodes).join()
        count = regions * nodes_per_region
        await asyncio.to_thread(until, lambda: _says(client, lambda s: s.nodes.online == count), "the fleet")
        yield fleet
    finally:
        for task in fleet.under_way:
            task.cancel()
        await asyncio.gather(*fleet.under_way, return_exceptions=True)
        for broker in brokers:
            await broker.close()
        coordinator.terminate()
        try:
            async with asyncio.timeout(20):
                await coordinator.wait()
        except TimeoutError:
            coordinator.kill()
            await coordinator.wait()
        for server in servers:
            server.kill()


def _server(file: Path, text: str, port: int) -> NatsServer:
    file.write_text(text)
    server = NatsServer(file, port)
    server.start()
    return server


def _says(client: Client, holds: Callable[[StatusView], bool]) -> bool:
    try:
        return holds(client.send(endpoints.status()))
    except TransientError:
        return False
