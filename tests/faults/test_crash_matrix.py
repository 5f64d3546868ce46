"""Every cell of the crash matrix (docs/rounds.md): who is killed, at which moment, and what must hold afterwards.

Each run is compared with the same run without faults: same bytes, each update counted once, no
task trained again once it was acknowledged, one run for one event.
"""

from __future__ import annotations

import asyncio
import json
import signal
import urllib.request
from collections.abc import AsyncIterator
from functools import partial

import onnx
import pytest
import pytest_asyncio

from fedtide.console import endpoints
from fedtide.fabric.events.envelope import Event
from fedtide.fabric.nats.jetstream import Received
from fedtide.fabric.nats.subjects import CHECKPOINTS, Subjects
from fedtide.fabric.plans.rollout_request import RolloutRequest
from tests.conftest import APPS
from tests.faults.campaign import CONFIG, POLICY, REGIONS, Campaign
from tests.faults.installation_with_faults import Faulty, faulty_installation
from tests.faults.schedule import Point
from tests.integration.installation import until
from tests.integration.releases import graph, produce

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.slow]

NODE = "eu-1"
MEGABYTE = 1_000_000


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def there(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Faulty]:
    async with faulty_installation(tmp_path_factory.mktemp("matrix"), REGIONS, 2, wired=(NODE,)) as faulty:
        yield faulty


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def work(there: Faulty) -> Campaign:
    campaign = Campaign(there, 0)
    await campaign.prepare()
    return campaign


CELLS = [
    *(("coordinator", "SIGKILL", moment, 1) for moment in ("run.requested", "run.aggregator_started", "round.opened")),
    ("coordinator", "SIGKILL", "round.update_received", 2),
    *(("coordinator", "SIGKILL", moment, 2) for moment in ("round.collected", "round.closed")),
    ("coordinator", "SIGKILL", "run.completed", 1),
    ("coordinator", "SIGSTOP", "round.opened", 3),
    ("aggregator", "SIGKILL", "run.aggregator_started", 1),
    ("aggregator", "SIGKILL", "round.update_received", 3),
    ("aggregator", "SIGKILL", "round.collected", 3),
    ("aggregator", "SIGKILL", "round.closed", 2),
    ("aggregator", "SIGTERM", "round.update_received", 18),
    ("aggregator", "SIGSTOP", "round.opened", 3),
    ("hub", "SIGKILL", "round.opened", 3),
    ("leaf-us", "SIGKILL", "round.opened", 3),
    ("link", "cut eu", "round.opened", 3),
    (f"agent-{NODE}", "SIGKILL", "round.opened", 3),
    (f"agent-{NODE}", "SIGTERM", "round.opened", 3),
    ("disk", f"full {NODE}", "round.opened", 3),
    ("all", "SIGKILL", "round.update_received", 2),
]


@pytest.mark.parametrize(("victim", "how", "moment", "nth"), CELLS)
async def test_the_run_ends_as_if_nothing_had_happened(
    work: Campaign, victim: str, how: str, moment: str, nth: int, request: pytest.FixtureRequest
) -> None:
    number = request.node.name
    await work.point(Point(number, moment, nth, 0.0, victim, how, 2.0))


async def test_an_aggregator_that_dies_in_the_middle_of_a_checkpoint_resumes_from_the_one_before(
    there: Faulty, work: Campaign
) -> None:
    subjects, strategy = Subjects(), {"strategy": "FedAdam"}
    first = await there.finished(await there.start_run(APPS / "mean", POLICY, run_config={**CONFIG, **strategy}))
    chunks: asyncio.Queue[str] = asyncio.Queue()

    async def note(message: Received) -> None:
        await chunks.put(message.subject)

    broker = await there.hub.connect("watcher")
    unsubscribe = await broker.subscribe(f"{subjects.root}.ckpt.*.blob.>", note)
    run = await there.start_run(APPS / "mean", POLICY, run_config={**CONFIG, **strategy})
    await there.event(lambda e: e.data.kind == "round.closed" and e.data.run == run and e.data.round == 2)
    while not chunks.empty():
        chunks.get_nowait()
    assert run in await chunks.get()  # the moments of the third round are on their way
    there.send("aggregator", signal.SIGKILL)
    head = await broker.last(CHECKPOINTS, subjects.checkpoint(run, "head"))
    assert head is not None
    await unsubscribe()
    await broker.close()
    view = await there.finished(run)
    assert (view.state, view.attempt) == ("completed", 2)
    assert there.final(run) == there.final(first.run)


@pytest.mark.parametrize("way", ["down", "up"])
async def test_an_interrupted_transfer_goes_on_at_the_missing_chunk_after_the_agent_was_killed(
    there: Faulty, work: Campaign, way: str
) -> None:
    """40 MB a round each way; the wire stops after 20 MB and the agent is killed."""
    wire = there.wires[NODE]
    config = {**CONFIG, "size": 10 * MEGABYTE, "delay": 0.0, "num-server-rounds": 1}
    policy = POLICY.model_copy(update={"min_updates": 2})
    run = await there.start_run(APPS / "mean", policy, run_config=config, selector={"region": "eu"})
    wire.stop_after(way, 20 * MEGABYTE)
    async with asyncio.timeout(60):
        await wire.stopped.wait()
    there.send(f"agent-{NODE}", signal.SIGKILL)
    before = wire.passed[way]
    wire.restore()
    view = await there.finished(run)
    assert view.state == "completed", view.reason
    assert view.rounds[-1].metrics["train_calls"] == 1.0
    # Going down the model comes twice (training, evaluation); what was there already does not come again.
    left = (80 if way == "down" else 40) - 20
    assert wire.passed[way] - before < (left + 10) * MEGABYTE


def _infer(url: str) -> list[float]:
    tensor = {"name": "x", "shape": [1, 3], "datatype": "FP32", "data": [1.0, 2.0, 3.0]}
    body = json.dumps({"inputs": [tensor]}).encode()
    kind = {"Content-Type": "application/json"}
    asked = urllib.request.Request(f"{url}/v2/models/scale/infer", body, kind)
    with urllib.request.urlopen(asked, timeout=10) as answer:
        outputs: list[float] = json.load(answer)["outputs"][0]["data"]
    return outputs


async def _publish_large_release(there: Faulty, factor: float) -> None:
    """A release of 4 MB, so that its download can be interrupted."""
    run = await there.start_run(APPS / "mean", POLICY, run_config={**CONFIG, "num-server-rounds": 1})
    await there.finished(run)
    model = onnx.load_from_string(graph(factor))
    model.doc_string = "x" * 4 * MEGABYTE
    await produce(there.hub, run, factor, onnx_bytes=model.SerializeToString())
    await there.event(lambda e: e.data.kind == "release.published")


async def test_a_roll_out_goes_on_when_its_coordinator_dies_in_every_stage_and_an_agent_while_activating(
    there: Faulty, work: Campaign
) -> None:
    await _publish_large_release(there, 2.0)
    wire, now = there.wires[NODE], len(there.seen)
    wire.stop_after("down", MEGABYTE)
    rollout: str = (await there.ask(endpoints.start_rollout(RolloutRequest(model="scale", canary=0.5)))).rollout

    def reached(event: Event, phase: str, node: str = "") -> bool:
        data = event.data
        return data.kind == "rollout.node_phase" and data.phase == phase and node in ("", data.node)

    await there.event(lambda e: reached(e, "downloading"), since=now)
    assert there.send("coordinator", signal.SIGKILL)
    await there.event(lambda e: reached(e, "downloading", NODE), since=now)
    async with asyncio.timeout(30):
        await wire.stopped.wait()
    assert there.send(f"agent-{NODE}", signal.SIGKILL)
    wire.restore()
    await there.event(lambda e: reached(e, "confirmed", NODE), since=now)
    assert there.send("coordinator", signal.SIGKILL)
    for node in there.layout.nodes:
        await there.event(partial(reached, phase="confirmed", node=node), since=now)
        url = (await there.ask(endpoints.node(node))).inference_url
        assert await asyncio.to_thread(_infer, url) == [2.0, 4.0, 6.0]
    assert (await there.ask(endpoints.rollout(rollout))).state == "completed"


async def test_a_region_that_is_cut_off_serves_on_and_its_finished_updates_flow_when_the_link_is_back(
    there: Faulty, work: Campaign
) -> None:
    url = (await there.ask(endpoints.node(NODE))).inference_url
    run = await there.start_run(APPS / "mean", POLICY, run_config={**CONFIG, "num-server-rounds": 2})
    await there.event(lambda e: e.data.kind == "round.opened" and e.data.run == run)
    busy = lambda: str(there.client.send(endpoints.node(NODE)).busy)  # noqa: E731
    await asyncio.to_thread(until, lambda: busy().startswith(run), "its training, which goes on without the link")
    there.links["eu"].cut()
    now = len(there.seen)
    await there.event(lambda e: e.data.kind == "node.offline" and e.data.node == NODE, since=now)
    assert await asyncio.to_thread(_infer, url) == [2.0, 4.0, 6.0]
    assert any((there.folder(NODE) / "outbox" / "done").glob(f"{run}-r1-*")), "the leaf has taken the update"
    there.links["eu"].restore()
    view = await there.finished(run)
    assert view.state == "completed", view
    assert view.rounds[-1].metrics["train_calls"] == 2.0, view
