"""A whole installation inside a test's loop, with proxies on its WAN links, whose parts can be killed."""

from __future__ import annotations

import asyncio
import json
import os
import resource
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import psutil

from fedtide.console import endpoints
from fedtide.console.client import Client
from fedtide.console.embedded.plan import Layout, lay_out
from fedtide.console.embedded.supervisor import Supervisor
from fedtide.console.endpoints import Call
from fedtide.console.home import Home
from fedtide.console.publishing import signed
from fedtide.coordinator.log.event_log import EventLog
from fedtide.fabric.errors import TransientError
from fedtide.fabric.events.envelope import Event
from fedtide.fabric.flower.app_files import bundle
from fedtide.fabric.flower.apps import describe
from fedtide.fabric.messages.views import RUN_ENDED, RunView
from fedtide.fabric.nats.subjects import Subjects
from fedtide.fabric.plans.round_policy import RoundPolicy
from fedtide.fabric.plans.run_spec import AppRef, RunRequest
from fedtide.fabric.trust.installation import PUBLISHER_KEY
from tests.faults.tcp_proxy import TcpProxy
from tests.hub import Hub

SETTLE_S = 120.0
T = TypeVar("T")
_UNLIMITED = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)


@dataclass
class Faulty:
    """`seen` are the events of the log as they were published, oldest first."""

    home: Home
    layout: Layout
    hub: Hub
    supervisor: Supervisor
    links: dict[str, TcpProxy]
    wires: dict[str, TcpProxy]
    client: Client
    log: EventLog
    seen: list[Event] = field(default_factory=list)
    _changed: asyncio.Event = field(default_factory=asyncio.Event)
    _reading: asyncio.Lock = field(default_factory=asyncio.Lock)

    @property
    def shown(self) -> dict[str, str]:
        """The header that callers of the API must show."""
        return {"Authorization": f"Bearer {self.home.api_token_file.read_text()}"}

    async def read_log(self, *_: object) -> None:
        """Take in what was logged since; also after the hub was away."""
        async with self._reading:
            async for event in self.log.replay():
                self.seen.append(event)
        self._changed.set()

    async def event(self, holds: Callable[[Event], bool], *, since: int = 0) -> Event:
        """The first event for which `holds`, from the one at index `since` of `seen` on."""
        looked_at = since
        async with asyncio.timeout(SETTLE_S):
            while True:
                for event in self.seen[looked_at:]:
                    if holds(event):
                        return event
                looked_at = len(self.seen)
                self._changed.clear()
                await self._changed.wait()

    async def ask(self, call: Call[T]) -> T:
        """What the API says, once a coordinator leads."""
        async with asyncio.timeout(SETTLE_S):
            while True:
                try:
                    return await asyncio.to_thread(self.client.send, call)
                except TransientError:
                    await asyncio.sleep(0.2)

    def signed(self, app: AppRef) -> AppRef:
        """As its publisher sends it."""
        return signed(app, str(self.home.trust / PUBLISHER_KEY))

    async def start_run(self, app: Path, policy: RoundPolicy, **options: Any) -> str:
        """The id of a fresh run of `app`."""
        ref = await asyncio.to_thread(self.client.send, endpoints.put_bundle(bundle(app)))
        asked = RunRequest(app=self.signed(AppRef(name=describe(app).name, bundle=ref)), policy=policy, **options)
        return (await asyncio.to_thread(self.client.send, endpoints.start_run(asked))).run

    async def finished(self, run: str) -> RunView:
        """The view of a run once it has ended."""

        def follow() -> RunView:
            while True:
                *_, view = self.client.stream(endpoints.watch_run(run))
                if view.state in RUN_ENDED:
                    return view

        async with asyncio.timeout(SETTLE_S):
            return await asyncio.to_thread(follow)

    def pid(self, name: str) -> int | None:
        """The process of a child by its name, or of `aggregator`: the newest one."""
        if name != "aggregator":
            return self.supervisor.pid_of(name)
        notes = sorted((self.home.root / "coordinator" / "runs").glob("*/aggregator.pid"), key=os.path.getmtime)
        try:
            pid: int = json.loads(notes[-1].read_text())["pid"]
        except (IndexError, OSError, ValueError):
            return None
        return pid

    def send(self, name: str, number: signal.Signals) -> bool:
        """Whether there was such a process to signal."""
        pid = self.pid(name)
        try:
            if pid is not None:
                os.kill(pid, number)
        except ProcessLookupError:
            return False
        return pid is not None

    def fill_disk(self, node: str, *, full: bool) -> None:
        """Let every write of a node's processes fail (or succeed again), as on a full disk."""
        agent = self.pid(f"agent-{node}")
        limit = (0, resource.RLIM_INFINITY) if full else _UNLIMITED
        for _ in range(2):  # again for those that were forked meanwhile
            for pid in _family(agent) if agent is not None else []:
                try:
                    resource.prlimit(pid, resource.RLIMIT_FSIZE, limit)
                except ProcessLookupError:
                    continue

    def folder(self, node: str) -> Path:
        return self.home.root / "nodes" / node

    def final(self, run: str) -> bytes:
        return (self.home.root / "coordinator" / "runs" / run / "out" / "final.npz").read_bytes()


def _family(pid: int) -> list[int]:
    """A process and all below it: a trainer has a child for each run."""
    try:
        process = psutil.Process(pid)
        return [pid, *(child.pid for child in process.children(recursive=True))]
    except psutil.NoSuchProcess:
        return []


@asynccontextmanager
async def faulty_installation(
    root: Path,
    regions: list[str],
    nodes_per_region: int,
    *,
    coordinators: int = 1,
    wired: tuple[str, ...] = (),
    agent: dict[str, Any] | None = None,
) -> AsyncIterator[Faulty]:
    """Everything up, with a proxy on each region's link to the hub and on the wires of the nodes in `wired`."""
    home = Home(root)
    layout = lay_out(home, regions, nodes_per_region, coordinators=coordinators, agent=agent)
    config = root / "config"
    links, wires = {}, {}
    for region in regions:
        links[region] = await _interpose(config / f"leaf-{region}.conf", "nats-leaf://127.0.0.1:")
    for node in wired:
        wires[node] = await _interpose(config / f"agent-{node}.json", "nats://127.0.0.1:")
    supervisor = Supervisor(home, layout)
    ready = asyncio.Event()
    running = asyncio.create_task(supervisor.run(ready))
    try:
        await asyncio.wait({running, asyncio.create_task(ready.wait())}, return_when=asyncio.FIRST_COMPLETED)
        if running.done():
            running.result()
        hub = Hub.of(home, layout.hub_url)
        broker = await hub.connect("faults")
        log = EventLog(broker, Subjects())
        there = Faulty(home, layout, hub, supervisor, links, wires, Client.of(home, layout.apis, by="test"), log)
        await broker.subscribe(Subjects().all_events, there.read_log)
        broker.when_reconnected(there.read_log)
        await there.read_log()
        await _all_online(there)
        try:
            yield there
        finally:
            await broker.close()
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        for proxy in [*links.values(), *wires.values()]:
            await proxy.close()


async def _interpose(file: Path, url: str) -> TcpProxy:
    """Put a proxy before the address that a configuration file names."""
    text = file.read_text()
    port = int("".join(c for c in text[text.index(url) + len(url) :][:5] if c.isdigit()))
    proxy = TcpProxy(port)
    await proxy.start()
    file.write_text(text.replace(f"{url}{port}", f"{url}{proxy.port}"))
    return proxy


async def _all_online(there: Faulty) -> None:
    async with asyncio.timeout(SETTLE_S):
        for node in there.layout.nodes:
            await there.event(lambda e, n=node: e.data.kind == "node.joined" and e.data.node == n)
