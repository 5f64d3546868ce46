"""The node's inference server, asked by a client that speaks the protocol, over HTTP and over NATS."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import pytest
import tritonclient.http as triton
from tritonclient.utils import InferenceServerException

from fedtide.edge_agent.comparison.comparison import Comparison
from fedtide.edge_agent.config import Capture
from fedtide.edge_agent.fleet_clock import FleetClock
from fedtide.edge_agent.samples.api import SampleApi
from fedtide.edge_agent.samples.capture import Capturer
from fedtide.edge_agent.samples.store import SampleStore
from fedtide.edge_agent.serving.inference_server import InferenceServer
from fedtide.edge_agent.serving.nats_inference import NatsInference
from fedtide.edge_agent.serving.protocol import HEADER_LENGTH
from fedtide.edge_agent.serving.serving import Serving
from fedtide.fabric.errors import TransientError
from fedtide.fabric.nats.broker import Broker
from fedtide.fabric.nats.jetstream import Received
from fedtide.fabric.nats.subjects import Subjects
from fedtide.fabric.plans.release import Export, Scoring
from fedtide.fabric.plans.rollout_plan import Desired, Measured, Terms
from tests.conftest import NatsServer
from tests.served import config, model

JSON = {"Content-Type": "application/json"}
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # geventhttpclient's imports


class Node:
    """A server without the rest of the agent."""

    def __init__(self, folder: Path) -> None:
        self.serving = Serving(config(folder, batch_wait_ms=2, queue_size=64))
        self.server = InferenceServer(config(folder), self.serving)
        self.store = SampleStore(folder / "samples.sqlite", 10**9, 1e9)
        self.capturer = Capturer(Capture(share=1.0), self.store, FleetClock())
        self.serving.observers.append(self.capturer.observe)
        self.labelled: list[str] = []

    async def start(self) -> None:
        await self.server.start(SampleApi("n", self.store, self.capturer, self.labelled.append).routes())

    async def client(self, do: Callable[[Any], Any]) -> Any:
        def call() -> Any:
            client = triton.InferenceServerClient(self.server.url.removeprefix("http://"), concurrency=1)
            try:
                return do(client)
            finally:
                client.close()

        return await asyncio.to_thread(call)


@pytest.fixture
async def node(tmp_path: Path) -> AsyncIterator[Node]:
    there = Node(tmp_path)
    await there.start()
    yield there
    await there.server.stop()
    there.serving.stop()
    there.store.close()


def _inputs(values: np.ndarray[Any, Any], *, binary: bool) -> list[Any]:
    tensor = triton.InferInput("x", list(values.shape), "FP32")
    tensor.set_data_from_numpy(values, binary_data=binary)
    return [tensor]


async def test_health_is_what_kubernetes_probes_ask_for(node: Node) -> None:
    assert await node.client(lambda c: (c.is_server_live(), c.is_server_ready())) == (True, False)
    node.server.ready = True
    assert await node.client(lambda c: c.is_server_ready())


@pytest.mark.parametrize("binary_in", [False, True])
@pytest.mark.parametrize("binary_out", [False, True])
async def test_a_client_of_the_protocol_is_answered_in_every_form(
    node: Node, tmp_path: Path, binary_in: bool, binary_out: bool
) -> None:
    node.serving.swap(model(tmp_path, 3))
    values = np.arange(6, dtype=np.float32).reshape(2, 3)
    wanted = [triton.InferRequestedOutput("y", binary_data=binary_out)]

    def ask(client: Any) -> Any:
        inputs = _inputs(values, binary=binary_in)
        found = client.infer("scale", inputs, outputs=wanted, request_id="abc", model_version="3")
        return found.as_numpy("y"), found.get_response()

    array, response = await node.client(ask)
    np.testing.assert_array_equal(array, 3 * values)
    assert (response["id"], response["model_name"], response["model_version"]) == ("abc", "scale", "3")


async def test_metadata_and_readiness_of_models_and_versions(node: Node, tmp_path: Path) -> None:
    node.serving.swap(model(tmp_path, 2))
    node.serving.keep(model(tmp_path, 1), "scale")

    def ask(client: Any) -> Any:
        return client.get_model_metadata("scale"), client.get_server_metadata(), client.is_model_ready("scale", "1")

    metadata, server, ready = await node.client(ask)
    assert metadata["versions"] == ["2", "1"]
    assert metadata["inputs"] == [{"name": "x", "datatype": "FP32", "shape": [-1, 3]}]
    assert "binary_tensor_data" in server["extensions"]
    assert ready
    assert not await node.client(lambda c: c.is_model_ready("nope") or c.is_model_ready("scale", "9"))


@pytest.mark.parametrize(
    ("values", "name", "words"),
    [
        (np.ones((1, 4), np.float32), "scale", "has shape"),
        (np.ones((1, 3), np.float32), "nope", "no model 'nope'"),
    ],
)
async def test_a_client_sees_why_it_is_refused(node: Node, tmp_path: Path, values: Any, name: str, words: str) -> None:
    node.serving.swap(model(tmp_path))
    with pytest.raises(InferenceServerException, match=words):
        await node.client(lambda c: c.infer(name, _inputs(values, binary=True)))


async def test_ten_swaps_under_load_drop_no_request_and_mix_no_versions(node: Node, tmp_path: Path) -> None:
    releases = [model(tmp_path, version) for version in range(1, 11)]
    node.serving.swap(releases[0])
    stop = asyncio.Event()
    seen: set[str] = set()
    answered = asyncio.Semaphore(0)

    async def ask(session: aiohttp.ClientSession) -> None:
        body = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [2, 3], "data": [1, 1, 1, 2, 2, 2]}]}
        while not stop.is_set():
            async with session.post(f"{node.server.url}/v2/models/scale/infer", json=body) as response:
                told = await response.json()
                assert response.status == 200, told
            version = float(told["model_version"])
            assert told["outputs"][0]["data"] == [version] * 3 + [2 * version] * 3
            seen.add(told["model_version"])
            answered.release()

    async with aiohttp.ClientSession() as session, asyncio.TaskGroup() as group:
        for _ in range(8):
            group.create_task(ask(session))
        for release in releases:
            node.serving.swap(release)
            for _ in range(30):
                await answered.acquire()
        stop.set()
    assert len(seen) == 10


async def test_a_full_queue_answers_429_and_when_to_come_back(tmp_path: Path) -> None:
    serving = Serving(config(tmp_path, batch_wait_ms=200, queue_size=2))
    serving.swap(model(tmp_path))
    server = InferenceServer(config(tmp_path), serving)
    await server.start()
    body = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 3], "data": [1, 1, 1]}]}
    async with aiohttp.ClientSession() as session:

        async def ask() -> tuple[int, str | None]:
            async with session.post(f"{server.url}/v2/models/scale/infer", json=body) as response:
                return response.status, response.headers.get("Retry-After")

        answers = await asyncio.gather(*(ask() for _ in range(8)))
    assert sorted(answers, key=str)[:2] == [(200, None)] * 2
    assert (429, "1") in answers
    await server.stop()
    serving.stop()


async def test_labels_reach_captured_samples_and_samples_are_deleted_on_request(node: Node, tmp_path: Path) -> None:
    node.serving.swap(model(tmp_path))
    values = np.ones((1, 3), np.float32)
    for key in ("a", "b"):
        await node.client(lambda c, k=key: c.infer("scale", _inputs(values, binary=True), request_id=k))
    models = f"{node.server.url}/v2/models/scale"
    async with aiohttp.ClientSession() as session:
        async with session.post(f"{models}/labels", json={"labels": {"a": 1, "nobody": 2}}) as response:
            assert await response.json() == {"received": 2, "matched": 1}
        assert node.labelled == ["scale"]
        async with session.post(f"{models}/labels", json={"labels": {"a": {}}}) as response:
            assert response.status == 400
        async with session.delete(f"{models}/samples", params={"id": "a"}) as response:
            assert await response.json() == {"deleted": 1}
        async with session.get(f"{node.server.url}/v2/samples") as response:
            assert (await response.json())["scale"]["samples"] == 1


async def _ask(broker: Broker, subject: str, data: bytes, headers: dict[str, str]) -> Received | None:
    try:
        return await broker.ask_with_headers(subject, data, headers)
    except TransientError:
        return None


async def test_inference_over_nats_speaks_the_same_bytes(node: Node, tmp_path: Path, hub: NatsServer) -> None:
    node.serving.swap(model(tmp_path, 2))
    here, there = await Broker.connect(hub.url, "node"), await Broker.connect(hub.url, "client")
    subjects = Subjects()
    await NatsInference(here, node.serving).listen(subjects, "eu", "n1", lambda handler: handler)
    values = np.ones((1, 3), np.float32)
    head = {
        "inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 3], "parameters": {"binary_data_size": 12}}],
        "parameters": {"binary_data_output": True},
    }
    text = json.dumps(head).encode()
    subject = subjects.infer("eu", "n1", "scale")
    asked = text + values.tobytes()
    answered = None
    for _ in range(200):  # nothing tells one client of a broker what another listens to
        answered = answered or await _ask(there, subject, asked, {HEADER_LENGTH: str(len(text))})
    assert answered is not None
    length = int(answered.headers[HEADER_LENGTH])
    assert json.loads(answered.data[:length])["model_version"] == "2"
    assert np.frombuffer(answered.data[length:], np.float32).tolist() == [2, 2, 2]
    refused = await there.ask_with_headers(subjects.infer("eu", "n1", "nope"), text + values.tobytes(), {})
    assert refused.headers["Status"] == "400"
    await here.close()
    await there.close()


HOSTILE = [
    {"inputs": [{"name": "x", "datatype": "BYTES", "shape": [1, 3], "data": ["1", "2", "3"]}]},
    {"id": "\ud800", "inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 3], "data": [1, 2, 3]}]},
    {"inputs": [{"name": "x", "datatype": "FP32", "shape": [0, 3], "data": []}]},
    {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 3], "data": [1e300, 1, 1]}]},
    {"inputs": [{"name": "x", "datatype": "FP32", "shape": [2**40, 3], "data": [1]}]},
]


async def test_whatever_a_client_sends_the_node_serves_and_captures_on(node: Node, tmp_path: Path) -> None:
    export = Export(scoring=Scoring(rule="value", at=0.1))
    candidate, incumbent = model(tmp_path, 2, export=export), model(tmp_path, 1, export=export)
    node.serving.swap(candidate)
    reports: asyncio.Queue[Measured] = asyncio.Queue()

    async def report(_: Desired, measured: Measured) -> None:
        reports.put_nowait(measured)

    terms = Terms(measure=True, holdout=10, shadow=1.0, report_s=0.01)
    desired = Desired(model="scale", counter=1, rollout="ro-1", release=candidate.release, terms=terms)
    comparison = Comparison(desired, candidate, incumbent, node.store, report)
    node.serving.observers.append(comparison.observe)
    watching = [asyncio.create_task(t) for t in (comparison.run(), node.capturer.run())]
    url = f"{node.server.url}/v2/models/scale"
    good = json.dumps({"id": "good", "inputs": HOSTILE[1]["inputs"]})
    async with aiohttp.ClientSession() as session:
        for body in HOSTILE:
            async with session.post(f"{url}/infer", data=json.dumps(body), headers=JSON) as response:
                assert response.status in (200, 400), await response.text()
        for labels in ({"\ud800": 1}, {"good": 10**400}, {"good": [[1]]}):
            async with session.post(f"{url}/labels", data=json.dumps({"labels": labels}), headers=JSON) as response:
                assert response.status == 400
        async with session.post(f"{url}/infer", data=good, headers=JSON) as response:
            assert response.status == 200
        async with session.post(f"{url}/labels", json={"labels": {"good": [2]}}) as response:
            assert (await response.json())["matched"] == 1
    comparison.labels_came()
    async with asyncio.timeout(20):
        while (await reports.get()).shadowed < 2:
            comparison.labels_came()
    assert not any(task.done() for task in watching)
    for task in watching:
        task.cancel()
    await asyncio.gather(*watching, return_exceptions=True)
