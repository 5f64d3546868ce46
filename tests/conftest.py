"""What tests share: a real nats-server for each test that asks, and printed seeds."""

from __future__ import annotations

import asyncio
import signal
import subprocess
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from fedtide.console.embedded import nats_config
from fedtide.console.embedded.plan import free_ports, nats_server
from fedtide.coordinator.adapters.topology import Topology as Streams
from fedtide.fabric.nats.broker import Broker
from fedtide.fabric.nats.subjects import Subjects

# Without a current loop pytest-asyncio would make one at its first test, and nobody would close it.
asyncio.set_event_loop(None)

APPS = Path(__file__).parent / "apps"
EXAMPLES = APPS.parents[1] / "examples"


class NatsServer:
    """A nats-server process that can be killed and started again on the same port and store."""

    def __init__(self, config: Path, port: int) -> None:
        self._config = config
        self.port = port
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"nats://127.0.0.1:{self.port}"

    def start(self) -> None:
        log = self._config.with_suffix(".log").open("ab")
        self._process = subprocess.Popen([nats_server(), "-c", str(self._config)], stdout=log, stderr=log)
        log.close()

    def freeze(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


@dataclass(frozen=True)
class Topology:
    """A hub and one leaf, with all streams."""

    hub: NatsServer
    leaf: NatsServer
    region: str
    subjects: Subjects


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[NatsServer]:
    """One hub with JetStream on, in a folder of its own."""
    port, leaf_port = free_ports(2)
    config = tmp_path / "hub.conf"
    config.write_text(nats_config.hub(port, leaf_port, tmp_path / "store"))
    server = NatsServer(config, port)
    server.start()
    yield server
    server.kill()


@pytest.fixture
async def topology(tmp_path: Path) -> AsyncIterator[Topology]:
    """Hub, one leaf, and the streams of both."""
    port, leaf_listen, leaf_port = free_ports(3)
    hub_config, leaf_config = tmp_path / "hub.conf", tmp_path / "leaf.conf"
    hub_config.write_text(nats_config.hub(port, leaf_listen, tmp_path / "hub"))
    leaf_config.write_text(nats_config.leaf("eu", leaf_port, leaf_listen, tmp_path / "eu"))
    hub, leaf = NatsServer(hub_config, port), NatsServer(leaf_config, leaf_port)
    hub.start()
    leaf.start()
    subjects = Subjects()
    broker = await Broker.connect(hub.url, "test-topology")
    streams = Streams(broker, subjects, ["eu"])
    await streams.ensure_hub()
    async with asyncio.timeout(30):
        await streams.ensure_region("eu")
    await broker.close()
    yield Topology(hub, leaf, "eu", subjects)
    leaf.kill()
    hub.kill()


@pytest.fixture
async def at_hub(topology: Topology) -> AsyncIterator[Broker]:
    broker = await Broker.connect(topology.hub.url, "test-hub")
    yield broker
    await broker.close()


@pytest.fixture
async def at_leaf(topology: Topology) -> AsyncIterator[Broker]:
    broker = await Broker.connect(topology.leaf.url, "test-leaf")
    yield broker
    await broker.close()
