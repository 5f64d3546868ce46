"""A node whose disk holds secrets, and a task loop that runs an app on it that does what it likes."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from fedtide.edge_agent.fleet_clock import FleetClock
from fedtide.edge_agent.identity.cluster_node import ClusterView
from fedtide.edge_agent.sandbox.levels import Level
from fedtide.edge_agent.tasks.governor import Latency
from fedtide.edge_agent.tasks.node_meter import NodeMeter
from fedtide.edge_agent.tasks.task_loop import TaskLoop
from fedtide.fabric.messages.tasks import Reply, Task, Values, WireMessage
from fedtide.fabric.plans.run_spec import AppRef
from fedtide.fabric.tensors.blobs import BlobRef
from tests.conftest import APPS
from tests.served import config
from tests.training import jobs

APPS_USER = "61234"
"""Nobody else on this machine."""
DIGEST = "1" * 64
POLICY = """
[[apps]]
name = "hostile"
network = {network}
data = ["{granted}"]
"""


async def _vouched_by_nobody(*_: object) -> frozenset[str]:
    """Here nothing is signed."""
    return frozenset()


async def _said_to_nobody(*_: object) -> None:
    """There is no coordinator."""


class Node:
    """A node's task loop, and what lies on its disk."""

    def __init__(self, folder: Path, level: Level, *, network: bool = False, policy: str | None = None) -> None:
        self.data, self.folder = folder / "node", folder
        for file in ("identity.creds", "samples.sqlite", "runs/run-0.state", "work/run-0/x", "jobs/run-0/out/t/x"):
            (self.data / file).parent.mkdir(parents=True, exist_ok=True)
            (self.data / file).write_text("secret")
        for name in ("hidden", "ungranted", "granted"):
            (folder / name).mkdir()
            (folder / name / "file").write_text("x")
        shutil.copytree(APPS / "hostile", self.data / "apps" / DIGEST)
        written = folder / "policy.toml"
        granted = folder / "granted"
        written.write_text(POLICY.format(network=str(network).lower(), granted=granted) if policy is None else policy)
        named = {name: f"at:{folder}/{name}/file" for name in ("hidden", "ungranted", "granted")}
        self.config = config(
            self.data,
            hidden=[folder / "hidden"],
            policy_file=written,
            node_config={**named, "data": f"at:{self.data}"},
        )
        self.become(level)

    def become(self, level: Level) -> None:
        """Keep apps in another level from now on."""
        self.level = level
        user = APPS_USER if level == "user" else None
        self.config = self.config.model_copy(update={"apps_user": user})

    @asynccontextmanager
    async def working(self) -> AsyncIterator[TaskLoop]:
        broker = type("Nobody", (), {"streams_of": str, "hub_of": str})()
        trust = type("Unsigned", (), {"app": _vouched_by_nobody, "refused": _said_to_nobody})()
        loop = TaskLoop(
            self.config, broker, Latency(), FleetClock(), ClusterView(), NodeMeter(lambda: (0, 0)), self.level, trust
        )
        running = asyncio.create_task(loop.run())
        try:
            yield loop
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)

    async def answer(self, loop: TaskLoop, attempt: str, name: str = "t1", run: str = "run-1") -> WireMessage:
        await loop.order(task(attempt, name, run))
        pending = self.data / "outbox" / "pending" / name / "reply.json"
        async with asyncio.timeout(60):
            while not pending.exists():  # noqa: ASYNC110  # the loop tells nobody but the broker
                await asyncio.sleep(0.02)
        return Reply.model_validate_json(pending.read_bytes()).message


def task(attempt: str, name: str, run: str) -> Task:
    message = jobs.message("train", {}, {})
    app = AppRef(name="hostile", bundle=BlobRef(digest=DIGEST, size_bytes=1))
    made = jobs.task(message, {"attempt": attempt})
    return made.model_copy(update={"task": name, "run": run, "app": app})


def metrics(message: WireMessage) -> dict[str, float]:
    assert message.error is None, message.error
    assert message.content is not None
    found = message.content["metrics"]
    assert isinstance(found, Values)
    return {name: float(value) for name, value in found.values.items()}
