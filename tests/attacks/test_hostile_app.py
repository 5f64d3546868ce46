"""An app that does what it likes, on a node that keeps it where it belongs: each attempt is made, for real."""

from __future__ import annotations

import asyncio
import os
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

from fedtide.edge_agent.config import Capture
from fedtide.edge_agent.samples.store import Sample, SampleStore, samples_file
from fedtide.edge_agent.sandbox.levels import ORDER, Level, is_enough, offered
from fedtide.edge_agent.tasks.app_places import AppPlaces
from fedtide.fabric.messages.tasks import Cancel
from tests.hostile_node import APPS_USER, Node, metrics, task

MOST = "user" if offered() == "bubblewrap" and os.geteuid() == 0 else offered()
LEVELS = [level for level in ORDER[1:] if is_enough(MOST, level)]


@pytest.mark.parametrize("level", LEVELS)
async def test_it_sees_what_it_was_granted_and_nothing_else(
    level: Level, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEDTIDE_JOIN_TOKEN", "ft1.secret")
    node = Node(tmp_path, level)
    async with node.working() as loop:
        found = metrics(await node.answer(loop, "look"))
    assert {name for name, value in found.items() if name.startswith("may-") and value != 1} == set()
    others = {name: value for name, value in found.items() if not name.startswith("may-") and name != "num-examples"}
    assert len(others) > 12
    assert {name for name, value in others.items() if value} == set()


@pytest.mark.parametrize("level", LEVELS)
async def test_without_a_policy_it_sees_the_machine_but_for_what_is_the_agents(level: Level, tmp_path: Path) -> None:
    node = Node(tmp_path, level)
    node.config = node.config.model_copy(update={"policy_file": None})
    async with node.working() as loop:
        found = metrics(await node.answer(loop, "look"))
    done = {name for name, value in found.items() if value}
    # Its folder is root's alone: a user of its own reaches there what it was granted, and no more.
    machine = {"may-granted", "ungranted"} if level != "user" else set()
    assert done == {"may-work", "may-home", "may-subprocess", "ipv4", "ipv6", "num-examples"} | machine


@pytest.mark.skipif(MOST != "user", reason="only root may become another user, and only with bubblewrap")
async def test_it_is_a_user_of_its_own_that_gets_nothing_of_roots(tmp_path: Path) -> None:
    node = Node(tmp_path, "user")
    (tmp_path / "granted" / "roots-own").write_text("for root alone")
    (tmp_path / "granted" / "roots-own").chmod(0o600)
    async with node.working() as loop:
        found = metrics(await node.answer(loop, "who"))
    uid = float(APPS_USER)
    for name in ("uid", "gid", "owner-of-output"):
        assert found.pop(name) == uid
    assert {name for name, value in found.items() if value} == {"own-processes", "shared-memory", "num-examples"}


@pytest.mark.skipif(MOST != "user", reason="only root may become another user, and only with bubblewrap")
@pytest.mark.parametrize(("before", "after"), [("bubblewrap", "user"), ("user", "bubblewrap")])
async def test_what_is_an_apps_stays_its_own_when_its_user_changes(before: Level, after: Level, tmp_path: Path) -> None:
    node = Node(tmp_path, before)
    usual = os.umask(0o077 if before == "bubblewrap" else 0o022)  # of a careful agent
    try:
        await _looks(node, "t1")
    finally:
        os.umask(usual)
    node.become(after)
    if after == "user":
        AppPlaces(node.config, after).let_read()
    await _looks(node, "t2")


async def _looks(node: Node, name: str) -> None:
    async with node.working() as loop:
        found = metrics(await node.answer(loop, "look", name=name))
    assert {name for name, value in found.items() if value} == {
        *(f"may-{may}" for may in ("work", "home", "granted", "subprocess")),
        "num-examples",
    }


async def test_its_name_is_no_way_out(tmp_path: Path) -> None:
    node = Node(tmp_path, LEVELS[0], policy='[[apps]]\nname = "*"\n')
    order = task("look", "t1", "run-1")
    async with node.working() as loop:
        await loop.order(order.model_copy(update={"app": order.app.model_copy(update={"name": "../../.."})}))
        found = metrics(await node.answer(loop, "look", name="t2"))
    assert not found["credentials"] and not found["own-code"]
    assert {entry.name for entry in tmp_path.iterdir()} == {"node", "policy.toml", "hidden", "ungranted", "granted"}
    assert len(list((node.data / "homes").iterdir())) == 2


@pytest.mark.parametrize("level", LEVELS)
async def test_it_reads_the_samples_of_a_node_that_shares_them_while_the_agent_writes(
    level: Level, tmp_path: Path
) -> None:
    node = Node(tmp_path, level)
    node.config = node.config.model_copy(update={"capture": Capture(share=1.0)})
    store = SampleStore(samples_file(node.data), 10**6, 10.0**6)
    async with node.working() as loop:
        for number in (1, 2):
            store.add([Sample("m", f"s{number}", time.time(), {"x": np.zeros((1, 2), np.float32)})], time.time())
            store.label("m", {f"s{number}": [1]}, time.time())
            assert metrics(await node.answer(loop, "samples", name=f"t{number}"))["samples"] == number
    store.close()


@pytest.mark.parametrize("level", LEVELS)
async def test_nothing_of_it_outlives_its_task(level: Level, tmp_path: Path) -> None:
    node = Node(tmp_path, level)
    work = node.data / "work" / "run-1"
    async with node.working() as loop:
        await node.answer(loop, "outlive")
        # The answer came after the end of both: nobody writes any more.
        before = {name: (work / name).read_text() for name in ("daemon", "thread")}
        assert (await node.answer(loop, "look", name="t2", run="run-2")).error is None
        assert {name: (work / name).read_text() for name in before} == before
    assert psutil.Process().children(recursive=True) == []


async def test_one_that_wakes_itself_between_tasks_is_ended(tmp_path: Path) -> None:
    node = Node(tmp_path, LEVELS[-1])
    awake = node.data / "work" / "run-1" / "awake"
    async with node.working() as loop:
        await node.answer(loop, "wake")
        (child,) = [each for each in psutil.Process().children(recursive=True) if each.num_threads() > 1]
        await asyncio.to_thread(child.wait, 30)
        before = awake.read_text()
        assert (await node.answer(loop, "look", name="t2", run="run-1")).error is None
        assert awake.read_text() == before


@pytest.mark.parametrize(
    "attempt",
    [
        f"say:{'x' * 200_000}",
        'say:{"loaded": []}',
        'say:{"done": true, "loaded": 1}',
        'say:{"done": true, "loaded": []}{"done": true, "loaded": []}',
        'say:{"done": true, "loaded": ["this"]}',
        f"say:{'[' * 30_000}",
        "nest",
        "sparse",
    ],
    ids=lambda attempt: attempt[:30],
)
async def test_what_it_says_or_leaves_ends_its_task_and_not_the_nodes_work(attempt: str, tmp_path: Path) -> None:
    node = Node(tmp_path, LEVELS[-1])
    async with node.working() as loop:
        answer = await node.answer(loop, attempt)
        assert (answer.error is None) == (attempt == "nest")
        assert (await node.answer(loop, "look", name="t2", run="run-2")).error is None
    assert "Zen of Python" not in (node.data / "trainer" / "trainer.log").read_text()
    assert not list((node.data / "jobs" / "run-1" / "out").iterdir())


@pytest.mark.skipif(MOST != "user", reason="only root may become another user, and only with bubblewrap")
async def test_a_link_below_a_folder_that_it_may_not_pass_shows_nothing_that_is_hidden(tmp_path: Path) -> None:
    real, closed = tmp_path / "real", tmp_path / "closed"
    (real / "hid").mkdir(parents=True)
    (real / "hid" / "file").write_text("secret")
    (real / "file").write_text("x")
    closed.mkdir(mode=0o700)
    (closed / "link").symlink_to(real)
    node = Node(tmp_path, "user", policy=f'[[apps]]\nname = "hostile"\ndata = ["{closed}/link"]\n')
    seen = {"granted": f"at:{closed}/link/file", "ungranted": f"at:{closed}/link/hid/file"}
    node.config = node.config.model_copy(
        update={"hidden": [tmp_path / "hidden", real / "hid"], "node_config": {**node.config.node_config, **seen}}
    )
    async with node.working() as loop:
        found = metrics(await node.answer(loop, "look"))
    assert (found["may-granted"], found["ungranted"]) == (1, 0)


@pytest.mark.parametrize("level", LEVELS)
async def test_a_fork_bomb_is_over_before_it_takes_the_machine(level: Level, tmp_path: Path) -> None:
    node = Node(tmp_path, level, policy='[[apps]]\nname = "hostile"\nprocesses = 40\n')
    async with node.working() as loop:
        order = task("bomb", "t1", "run-1")
        await loop.order(order)
        there: list[int] = []
        async with asyncio.timeout(60):
            while len(there) < 100 or there[-1] < 40:  # it grows no more
                there.append(len(psutil.Process().children(recursive=True)))
                await asyncio.sleep(0.02)
        assert max(there) < 2 * 40, "those that ask at the same time may be let go on together"
        await loop.order(Cancel(task="t1", run="run-1"))
        assert (await node.answer(loop, "look", name="t2", run="run-2")).error is None


@pytest.mark.parametrize("level", LEVELS)
async def test_an_answer_that_is_a_link_is_none(level: Level, tmp_path: Path) -> None:
    node = Node(tmp_path, level)
    async with node.working() as loop:
        answer = await node.answer(loop, "link")
    assert answer.error is not None
    assert "secret" not in answer.model_dump_json()


@pytest.mark.parametrize(
    ("policy", "why"),
    [
        ("training = false", "training = false"),
        ('sandbox = "bubblewrap"\n[[apps]]\n', "demands a sandbox (sandbox = 'bubblewrap'), and it has 'landlock'"),
        ('[[apps]]\nname = "digits*"\n', "has no rule ([[apps]]) for 'hostile', 111111111111"),
        ('[[apps]]\ndigests = ["2222"]\n', "has no rule"),
        ("[[apps]]\nnetwrk = true", "apps.0.netwrk: there is no such field"),
        ("apps = [", "is not TOML"),
    ],
)
async def test_what_the_owner_does_not_allow_does_not_begin(policy: str, why: str, tmp_path: Path) -> None:
    node = Node(tmp_path, "landlock", policy=policy)
    async with node.working() as loop:
        answer = await node.answer(loop, "look")
    assert answer.error is not None
    assert why in answer.error.reason
    assert not (node.data / "work" / "run-1").exists()


async def test_a_policy_that_others_can_write_allows_nothing(tmp_path: Path) -> None:
    node = Node(tmp_path, "landlock")
    (tmp_path / "policy.toml").chmod(0o666)
    async with node.working() as loop:
        answer = await node.answer(loop, "look")
        assert answer.error is not None
        assert "can be written by others than root" in answer.error.reason
        (tmp_path / "policy.toml").chmod(0o644)
        assert (await node.answer(loop, "look", name="t2")).error is None, "it is looked at again for each task"
