"""To be run where a cgroup (v2) is delegated to the process: pytest collects it only if it is named.

That kernel has no Landlock: apps are in no sandbox, and only the group holds them.
"""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

from fedtide.fabric.messages.tasks import Cancel
from tests.hostile_node import Node, task

GROUP = Path("/sys/fs/cgroup/agent.service")
APPS = GROUP / "apps"
POLICY = 'sandbox = "none"\n[[apps]]\nname = "hostile"\n'


def counted(file: str, name: str) -> int:
    return next(int(value) for key, value in map(str.split, (APPS / file).read_text().splitlines()) if key == name)


def there() -> list[str]:
    return (APPS / "cgroup.procs").read_text().split()


async def test_a_fork_bomb_has_as_many_processes_as_the_owner_allows_and_ends_with_its_task(tmp_path: Path) -> None:
    node = Node(tmp_path, "none", policy=f"{POLICY}processes = 40\n")
    async with node.working() as loop:
        await loop.order(task("bomb", "t1", "run-1"))
        async with asyncio.timeout(100):
            while not APPS.exists() or counted("pids.events", "max") < 20:  # noqa: ASYNC110  # the kernel tells nobody
                await asyncio.sleep(0.1)
        assert 10 < len(there()) <= 40
        await loop.order(Cancel(task="t1", run="run-1"))
        assert (await node.answer(loop, "burn", name="t2", run="run-2")).error is None
    async with asyncio.timeout(30):
        while counted("cgroup.events", "populated"):  # noqa: ASYNC110  # the last are dying
            await asyncio.sleep(0.1)
    assert (GROUP / "agent" / "cgroup.procs").read_text().split()


async def test_an_app_that_takes_more_memory_than_it_may_is_ended_and_the_agent_is_not(tmp_path: Path) -> None:
    node = Node(tmp_path, "none", policy=f"{POLICY}memory_bytes = 400_000_000\n")
    async with node.working() as loop:
        before = counted("memory.events", "oom_kill")
        answer = await node.answer(loop, "grow")
        assert answer.error is not None
        assert "killed by SIGKILL" in answer.error.reason
        assert counted("memory.events", "oom_kill") > before
        assert int((APPS / "memory.peak").read_text()) <= 400_000_000
        assert (await node.answer(loop, "burn", name="t2", run="run-2")).error is None


async def test_an_app_gets_the_share_of_the_processor_that_it_may_have(tmp_path: Path) -> None:
    node = Node(tmp_path, "none", policy=f"{POLICY}cpus = 0.25\n")
    async with node.working() as loop:
        throttled, began = counted("cpu.stat", "throttled_usec"), time.monotonic()
        assert (await node.answer(loop, "burn")).error is None
        seconds = time.monotonic() - began
    assert counted("cpu.stat", "throttled_usec") - throttled > 1e6
    assert seconds > 3, "a second of work, at a quarter of a core"
