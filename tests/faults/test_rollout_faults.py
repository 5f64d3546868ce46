"""Roll-outs while things break: processes killed for real, links cut and measured."""

from __future__ import annotations

import asyncio
import json
import signal
import sys
import urllib.request
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytest_asyncio
from onnx import TensorProto, helper, numpy_helper

from fedtide.console import endpoints
from fedtide.fabric.events.rollouts import NodePhaseReported
from fedtide.fabric.messages.views import RolloutView
from fedtide.fabric.plans.rollout_request import RolloutRequest
from fedtide.fabric.tensors.frame import Tensor, encode
from fedtide.fabric.validation import checked
from tests.faults.installation_with_faults import Faulty, faulty_installation
from tests.integration.installation import until
from tests.integration.releases import publish

pytestmark = [pytest.mark.asyncio(loop_scope="module")]

MEGABYTE = 1_000_000
SIDE = 1000


def graph(factor: float, filling: int) -> tuple[bytes, Any]:
    """y = x * factor beside a table of 4 MB that nothing can compress, and its sample."""
    table = np.random.default_rng(filling).random((SIDE, SIDE), np.float32)
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 3])
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 3])]
    constants = [numpy_helper.from_array(np.array(factor, np.float32), "factor"), numpy_helper.from_array(table, "t")]
    nodes = [
        helper.make_node("ReduceMax", ["t"], ["top"], keepdims=0),
        helper.make_node("Mul", ["top", "zero"], ["nothing"]),
        helper.make_node("Mul", ["x", "factor"], ["scaled"]),
        helper.make_node("Add", ["scaled", "nothing"], ["y"]),
    ]
    constants.append(numpy_helper.from_array(np.array(0, np.float32), "zero"))
    body = helper.make_graph(nodes, "scale", [x], outputs, constants)
    model = helper.make_model(body, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    sample = np.array([[1, 2, 3]], np.float32)
    return model.SerializeToString(), encode(
        [Tensor.of("in.x", sample), Tensor.of("out.y", sample * np.float32(factor))]
    )


class Rollouts:
    """Short ways to say what happens. Version `n` multiplies by `n`."""

    def __init__(self, there: Faulty) -> None:
        self.there = there
        self.version = 0

    async def publish(self, filling: int | None = None) -> int:
        self.version += 1
        await publish(self.there.hub, self.version, *graph(self.version, filling or self.version))
        await self.there.event(lambda e: e.data.kind == "release.published" and e.data.manifest.version == self.version)
        return self.version

    async def start(self, **request: Any) -> str:
        asked = checked(RolloutRequest, {"model": "scale", "canary": 0.5, **request})
        view = await self.there.ask(endpoints.start_rollout(asked))
        return view.rollout

    async def ended(self, rollout: str) -> RolloutView:
        """Its view, once it is not rolling any more."""

        def follow() -> RolloutView:
            *_, last = self.there.client.stream(endpoints.watch_rollout(rollout), timeout_s=90)
            return last

        view = await asyncio.to_thread(follow)
        await self.there.read_log()
        return view

    def phases(self, rollout: str, node: str) -> list[str]:
        told = (e.data for e in self.there.seen if isinstance(e.data, NodePhaseReported))
        return [d.phase for d in told if d.rollout == rollout and d.node == node]

    async def serves(self, node: str, version: int) -> None:
        url = (await self.there.ask(endpoints.node(node))).inference_url
        await asyncio.to_thread(until, lambda: answer(url) == (str(version), [version] * 3), f"version {version}")


def answer(url: str) -> tuple[str, list[float]] | None:
    tensor = {"name": "x", "shape": [1, 3], "datatype": "FP32", "data": [1, 1, 1]}
    try:
        body, kind = json.dumps({"inputs": [tensor]}).encode(), {"Content-Type": "application/json"}
        asked = urllib.request.Request(f"{url}/v2/models/scale/infer", body, kind)
        with urllib.request.urlopen(asked, timeout=5) as response:
            told = json.loads(response.read())
    except OSError:
        return None
    return told["model_version"], told["outputs"][0]["data"]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def there(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Faulty]:
    root = tmp_path_factory.mktemp("rollout-faults")
    async with faulty_installation(root, ["eu", "us"], 2, wired=("us-2",)) as faulty:
        yield faulty


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def work(there: Faulty) -> Rollouts:
    return Rollouts(there)


async def test_a_release_crosses_each_link_once_however_many_nodes_take_it(work: Rollouts) -> None:
    await work.publish()
    before = {region: link.passed["down"] for region, link in work.there.links.items()}
    view = await work.ended(await work.start())
    assert view.state == "completed"
    for region in view.regions:
        crossed = work.there.links[region.region].passed["down"] - before[region.region]
        assert 4 * SIDE * SIDE < region.wan_bytes < 1.01 * 4 * SIDE * SIDE
        assert region.wan_bytes < crossed < 1.1 * region.wan_bytes


@pytest.mark.slow
async def test_three_regions_of_ten_nodes_cost_one_copy_a_region(tmp_path: Path) -> None:
    async with faulty_installation(tmp_path, ["eu", "us", "ap"], 10) as there:
        work = Rollouts(there)
        await work.publish()
        before = {region: link.passed["down"] for region, link in there.links.items()}
        view = await work.ended(await work.start())
        assert view.state == "completed"
        assert sum(region.confirmed for region in view.regions) == 30
        for region, link in there.links.items():
            assert 4 * SIDE * SIDE < link.passed["down"] - before[region] < 1.1 * 4 * SIDE * SIDE


async def test_of_a_new_release_only_the_changed_tensors_cross_the_link(work: Rollouts) -> None:
    await work.publish(filling=1)
    view = await work.ended(await work.start())
    assert view.state == "completed"
    assert all(0 < region.wan_bytes < 10_000 for region in view.regions)


MOMENTS = [
    pytest.param("rollout.started", marks=pytest.mark.slow),
    pytest.param("rollout.region_cached", marks=pytest.mark.slow),
    pytest.param("rollout.node_phase downloading", marks=pytest.mark.slow),
    "rollout.node_phase confirmed",
    pytest.param("alarm.rang", marks=pytest.mark.slow),
    pytest.param("rollout.pause_requested", marks=pytest.mark.slow),
]


@pytest.mark.parametrize("moment", MOMENTS)
async def test_a_coordinator_that_is_killed_goes_on_with_the_same_wave(work: Rollouts, moment: str) -> None:
    there, since = work.there, len(work.there.seen)
    await work.publish(filling=1)
    rollout = await work.start(bake={"seconds": 0.5})
    if moment == "rollout.pause_requested":
        await there.ask(endpoints.act_on_rollout(rollout, "pause"))
    kind, _, phase = moment.partition(" ")
    await there.event(
        lambda e: (
            e.data.kind == kind
            and rollout in (getattr(e.data, "rollout", ""), getattr(e.data, "id", ""))
            and phase in ("", getattr(e.data, "phase", ""))
        ),
        since=since,
    )
    there.send("coordinator", signal.SIGKILL)
    await there.event(lambda e: e.data.kind == "coordinator.elected", since=len(there.seen))
    if moment == "rollout.pause_requested":
        assert (await there.ask(endpoints.rollout(rollout))).state == "paused"
        await there.ask(endpoints.act_on_rollout(rollout, "resume"))
    view = await work.ended(rollout)
    assert view.state == "completed", view
    for node in there.layout.nodes:
        assert work.phases(rollout, node).count("active") == 1
        await work.serves(node, work.version)


@pytest.mark.slow
async def test_a_leaf_that_is_killed_during_a_download_is_waited_for(work: Rollouts) -> None:
    there, since = work.there, len(work.there.seen)
    await work.publish()
    rollout = await work.start(node_bytes_per_s=2 * MEGABYTE, regions=["us"])
    await there.event(lambda e: getattr(e.data, "phase", "") == "downloading", since=since)
    there.send("leaf-us", signal.SIGKILL)
    view = await work.ended(rollout)
    assert view.state == "completed", view
    assert all(work.phases(rollout, node)[-1] == "confirmed" for node in ("us-1", "us-2"))


@pytest.mark.slow
async def test_a_node_that_was_away_takes_the_latest_release_and_none_in_between(work: Rollouts) -> None:
    there, wire = work.there, work.there.wires["us-2"]
    url = (await there.ask(endpoints.node("us-2"))).inference_url
    before = answer(url)
    wire.cut()
    await there.event(lambda e: e.data.kind == "node.offline" and e.data.node == "us-2")
    rollouts = []
    for _ in range(2):
        await work.publish(filling=1)
        rollouts.append(await work.start(claim_deadline_s=3, regions=["us"]))
        view = await work.ended(rollouts[-1])
        assert (view.state, view.regions[0].absent) == ("completed", 1)
    assert answer(url) == before
    wire.restore()
    await work.serves("us-2", work.version)
    await there.event(lambda e: getattr(e.data, "rollout", "") == rollouts[1] and getattr(e.data, "node", "") == "us-2")
    assert work.phases(rollouts[0], "us-2") == []


async def _agent(module: str, *arguments: str) -> asyncio.subprocess.Process:
    quiet = asyncio.subprocess.DEVNULL
    return await asyncio.create_subprocess_exec(sys.executable, "-m", module, *arguments, stderr=quiet)


SLOW = [pytest.param(p, marks=pytest.mark.slow) for p in ("downloading", "verified", "smoke_tested")]
PHASES = ["staged", "active", *SLOW]


@pytest.mark.parametrize("phase", PHASES)
async def test_an_agent_that_is_killed_in_any_phase_ends_with_the_old_or_the_new_release_whole(
    work: Rollouts, phase: str, tmp_path: Path
) -> None:
    there = work.there
    told = json.loads((there.home.root / "config" / "agent-eu-1.json").read_text())
    name = f"eu-{phase.replace('_', '-')}"
    config = tmp_path / "agent.json"
    config.write_text(json.dumps({**told, "node": name, "data_dir": str(tmp_path / "node")}))
    for filling in (0, 1):
        await work.publish(filling=filling)
    agent = await _agent("fedtide.edge_agent", "--config", str(config))
    try:
        await there.event(lambda e: e.data.kind == "node.joined" and e.data.node == name)
        view = await work.ended(await work.start(version=work.version - 1, selector={"node": name}))
        assert view.state == "completed", view
    finally:
        agent.terminate()
        await agent.wait()
    since = len(there.seen)
    dying = await _agent("tests.faults.agent_that_dies", phase, "--config", str(config))
    await there.event(lambda e: e.data.kind in ("node.joined", "node.online") and e.data.node == name, since=since)
    rollout = await work.start(selector={"node": name})
    async with asyncio.timeout(60):
        assert await dying.wait() == -signal.SIGKILL
    agent = await _agent("fedtide.edge_agent", "--config", str(config))
    try:
        view = await work.ended(rollout)
        assert view.state == "completed", view
        await work.serves(name, work.version)
        current = json.loads((tmp_path / "node" / "models" / "current" / "scale.json").read_text())
        kept = {folder.name for folder in (tmp_path / "node" / "models" / "releases").iterdir()}
        assert {current["release"]["digest"], current["previous"]["digest"]} == kept
    finally:
        agent.terminate()
        await agent.wait()
