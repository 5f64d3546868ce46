"""Releases reach nodes region by region, serve, and are taken back by themselves when they are bad."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from fedtide.console.embedded.plan import free_ports
from fedtide.fabric.messages.views import PlannedRollout, RolloutView
from fedtide.fabric.nats.subjects import Subjects
from fedtide.fabric.tensors.blobs import chunked, manifest_of
from fedtide.fabric.tensors.frame import Tensor, encode
from tests.integration.conftest import bring_up
from tests.integration.installation import Installation, children, until
from tests.integration.releases import graph, publish, release, trained_release


@pytest.fixture(scope="module")
def there(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Two regions of one node: their model stores belong to these tests."""
    installation = bring_up(tmp_path_factory.mktemp("rollouts"), "eu,us", 1)
    yield installation
    installation.run("down")


def _rolled(there: Installation, *options: str) -> RolloutView:
    key = there.json("rollout", "start", "scale", *options)["rollout"]
    there.run("rollout", "watch", key)
    return there.rollout(key)


JSON = {"Content-Type": "application/json"}


def _ask(there: Installation, node: str, path: str, body: object = None) -> tuple[int, Any]:
    url = there.node(node).inference_url + path
    data = None if body is None else json.dumps(body).encode() if not isinstance(body, bytes) else body
    try:
        with urllib.request.urlopen(urllib.request.Request(url, data, JSON), timeout=10) as response:
            return response.status, json.loads(response.read())
    except urllib.error.HTTPError as exc:
        with exc:
            return exc.code, json.loads(exc.read())


def _request(values: list[float], shape: list[int] | None = None, **changes: Any) -> dict[str, Any]:
    tensor = {"name": "x", "shape": shape or [1, len(values)], "datatype": "FP32", "data": values}
    return {"id": "42", "inputs": [{**tensor, **changes}]}


def _answer(there: Installation, node: str) -> Any:
    status, answer = _ask(there, node, "/v2/models/scale/infer", _request([1, 2, 3]))
    assert status == 200, answer
    return answer["model_version"], answer["outputs"][0]["data"]


def test_a_good_release_is_confirmed_in_region_order_and_answers(there: Installation) -> None:
    version = release(there, 2.0)
    view = _rolled(there, "--regions", "us,eu")
    assert view.state == "completed"
    assert [(r.region, r.confirmed, r.failed) for r in view.regions] == [("us", 1, 0), ("eu", 1, 0)]
    for node in ("eu-1", "us-1"):
        assert _answer(there, node) == (str(version), [2, 4, 6])


def test_the_open_inference_protocol_is_answered_as_it_says(there: Installation) -> None:
    assert _ask(there, "eu-1", "/v2/health/live")[0] == 200
    assert _ask(there, "eu-1", "/v2/health/ready")[0] == 200
    status, metadata = _ask(there, "eu-1", "/v2/models/scale")
    assert status == 200
    assert metadata["inputs"] == [{"name": "x", "datatype": "FP32", "shape": [-1, 3]}]
    assert metadata["outputs"] == [{"name": "y", "datatype": "FP32", "shape": [-1, 3]}]
    version = metadata["versions"][0]
    assert _ask(there, "eu-1", f"/v2/models/scale/versions/{version}/ready")[0] == 200
    status, answer = _ask(there, "eu-1", "/v2/models/scale/infer", _request([1, 2, 3, 4, 5, 6], [2, 3]))
    assert (status, answer["id"], answer["outputs"][0]["shape"]) == (200, "42", [2, 3])


def test_a_node_tells_prometheus_what_it_serves_and_how_fast(there: Installation) -> None:
    def sample(name: str, **labels: str) -> float:
        with urllib.request.urlopen(f"{there.node('eu-1').inference_url}/metrics", timeout=10) as page:
            families = text_string_to_metric_families(page.read().decode())
        found = [s for f in families for s in f.samples if s.name == name and labels.items() <= s.labels.items()]
        return sum(s.value for s in found)

    version, _ = _answer(there, "eu-1")
    before = sample("fedtide_inference_seconds_count", model="scale")
    assert _ask(there, "eu-1", "/v2/models/scale/infer", _request([1, 2, 3]))[0] == 200
    assert sample("fedtide_inference_seconds_count", model="scale") == before + 1
    assert sample("fedtide_node_serves", model="scale", version=version) == 1
    assert [sample(f"fedtide_node_{name}") for name in ("ready", "connected", "training")] == [1, 1, 0]
    assert sample("fedtide_node_cpu_seconds_total") > 0 and sample("fedtide_node_received_bytes_total") > 0


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"not json", "malformed"),
        ({}, "malformed"),
        (_request([1, 2, 3], datatype="FP31"), "FP31"),
        (_request([1, 2, 3], [1, 4]), "do not fill shape"),
        (_request([1, 2, 3], name="z"), "takes inputs"),
        (_request([1, 2]), "has shape [1, 2]"),
        ({**_request([1, 2, 3]), "outputs": [{"name": "nope"}]}, "no output 'nope'"),
    ],
)
def test_a_bad_request_is_answered_with_400_and_the_reason(there: Installation, body: Any, words: str) -> None:
    status, answer = _ask(there, "eu-1", "/v2/models/scale/infer", body)
    assert status == 400
    assert words in answer["error"]


def test_an_unknown_model_or_version_is_404(there: Installation) -> None:
    assert _ask(there, "eu-1", "/v2/models/nope/infer", _request([1]))[0] == 404
    assert _ask(there, "eu-1", "/v2/models/scale/versions/99")[0] == 404


def test_a_release_that_does_not_do_what_it_promises_stops_at_the_canary(there: Installation) -> None:
    before = {node: _answer(there, node) for node in ("eu-1", "us-1")}
    release(there, 3.0, promised=3.5)
    view = _rolled(there)
    assert view.state == "rolledback"
    assert "smoke inference" in view.reason
    assert view.regions[1].phases == {}
    assert {node: _answer(there, node) for node in before} == before


def test_a_file_that_is_no_onnx_graph_is_refused_and_the_old_release_serves_on(there: Installation) -> None:
    before = _answer(there, "eu-1")
    release(there, 1.0, onnx_bytes=b"this is no graph")
    view = _rolled(there)
    assert view.state == "rolledback"
    assert "cannot load the graph" in view.reason
    assert _answer(there, "eu-1") == before


def test_a_release_can_be_pulled_and_asked_through_the_cli(there: Installation, tmp_path: Path) -> None:
    version = trained_release(there, 5.0)
    assert _rolled(there).state == "completed"
    target = tmp_path / "m.onnx"
    assert there.run("model", "pull", "scale", "--file", str(target)).returncode == 0
    assert target.read_bytes() == graph(5.0)
    request = tmp_path / "request.json"
    request.write_text(json.dumps(_request([1, 1, 1])))
    done = there.run("infer", "us-1", str(request), "--model", "scale")
    assert json.loads(done.stdout)["outputs"][0]["data"] == [5, 5, 5]
    shown = there.model("scale").releases[-1]
    assert shown.version == version
    assert shown.lineage.participants == 2


def _swapped_names(factor: float) -> bytes:
    """As `graph`, and whoever knew its input as `x` knows it no more."""
    proto = onnx.ModelProto.FromString(graph(factor))
    proto.graph.input[0].name = proto.graph.node[0].input[0] = "z"
    return bytes(proto.SerializeToString())


def test_a_release_with_other_inputs_is_refused_unless_the_plan_says_so(there: Installation) -> None:
    before = _answer(there, "eu-1")
    hub, version = there.hub, before[0]
    sample = [Tensor.of("in.z", np.ones((1, 3), np.float32)), Tensor.of("out.y", np.full((1, 3), 7, np.float32))]
    asyncio.run(publish(hub, int(version) + 1, _swapped_names(7.0), encode(sample)))
    until(lambda: there.model("scale").latest == int(version) + 1, "the release")
    view = _rolled(there)
    assert view.state == "rolledback"
    assert "its inputs are z float32" in view.reason
    assert "new_interface" in view.reason
    assert _answer(there, "eu-1") == before
    assert _rolled(there, "--set", "new_interface=true").state == "completed"
    back = there.rollouts()[-1].rollout
    assert there.run("rollout", "rollback", back).returncode == 0
    there.run("rollout", "watch", back)
    assert _answer(there, "eu-1") == before


def test_a_release_whose_bytes_are_damaged_reaches_no_region_and_can_be_repaired(there: Installation) -> None:
    before = _answer(there, "eu-1")
    version = release(there, 8.0)
    content = graph(8.0)
    part = manifest_of(list(chunked([content]))).ref
    subject = f"{Subjects().release_blob(part.digest)}.0"

    async def put(data: bytes) -> None:
        broker = await there.hub.connect("vandal")
        await broker.publish(subject, data)
        await broker.close()

    asyncio.run(put(b"x" * len(content)))
    key = there.json("rollout", "start", "scale")["rollout"]
    assert there.run("rollout", "wait", key, "--for", "paused", "--timeout", "30").returncode == 0
    assert "does not match its digest" in there.rollout(key).reason
    assert _answer(there, "eu-1") == before
    asyncio.run(put(content))
    assert there.run("rollout", "resume", key).returncode == 0
    assert there.run("rollout", "wait", key, "--for", "completed", "--timeout", "30").returncode == 0
    assert _answer(there, "eu-1")[0] == str(version)


def test_a_person_can_plan_pause_approve_and_wait(there: Installation, tmp_path: Path) -> None:
    version = release(there, 9.0)
    file = tmp_path / "plan.yaml"
    file.write_text("model: scale\nregions: [eu, us]\napprove: [us]\ncanary: 1\nbake: {seconds: 0.2}\n")
    planned = PlannedRollout.model_validate(there.json("rollout", "plan", str(file)))
    assert planned.version == version
    assert [(r.region, r.nodes, r.canaries) for r in planned.regions] == [
        ("eu", ["eu-1"], ["eu-1"]),
        ("us", ["us-1"], ["us-1"]),
    ]
    assert all(0 < r.wan_bytes < 3000 for r in planned.regions)
    assert planned.at_least_seconds == 0.4
    key = there.json("rollout", "start", str(file))["rollout"]
    assert there.run("rollout", "wait", key, "--for", "region=eu", "--timeout", "30").returncode == 0
    assert "approval" in there.rollout(key).reason
    assert there.json("rollout", "pause", key, "--reason", "lunch")["state"] == "paused"
    assert there.run("rollout", "wait", key, "--for", "completed", "--timeout", "0.5").returncode == 75
    assert there.run("rollout", "resume", key).returncode == 0
    assert there.run("rollout", "promote", key, "--region", "us").returncode == 0
    assert there.run("rollout", "wait", key, "--for", "completed", "--timeout", "30").returncode == 0
    refused = there.run("rollout", "promote", key)
    assert refused.returncode == 2
    assert "is completed, which `promote` cannot change" in refused.stderr
    assert "confirmed as" in there.run("why", "us-1").stdout
    assert f"v{version}  completed" in there.run("rollout", "get", key).stdout


def test_an_agent_that_was_killed_serves_its_release_again_when_it_is_back(there: Installation) -> None:
    before = _answer(there, "eu-1")
    url = there.node("eu-1").inference_url
    (pid,) = children(there.state["pid"], "agent-eu-1")
    os.kill(pid, signal.SIGKILL)
    until(lambda: there.node("eu-1").inference_url != url, "the agent's return")
    assert _answer(there, "eu-1") == before


def test_a_release_that_is_damaged_on_disk_is_fetched_again(there: Installation) -> None:
    before = _answer(there, "eu-1")
    folder = there.home / "nodes" / "eu-1" / "models"
    current = json.loads((folder / "current" / "scale.json").read_text())["release"]["digest"]
    for file in folder.glob("releases/*/model.onnx"):  # also the one before: there is nothing to fall back to
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 0xFF
        file.write_bytes(content)
    url = there.node("eu-1").inference_url
    (pid,) = children(there.state["pid"], "agent-eu-1")
    os.kill(pid, signal.SIGKILL)
    until(lambda: there.node("eu-1").inference_url != url, "the agent's return")
    until(lambda: there.node("eu-1").serving.get("scale", "") == current, "the repaired release")
    assert _answer(there, "eu-1") == before
    with urllib.request.urlopen(f"{there.node('eu-1').inference_url}/v2/health/ready", timeout=5) as response:
        assert response.status == 200


def test_an_agent_without_any_broker_serves_what_its_disk_holds(there: Installation, tmp_path: Path) -> None:
    version, answer = _answer(there, "us-1")
    shutil.copytree(there.home / "nodes" / "us-1" / "models", tmp_path / "models")
    (port,) = free_ports(1)
    environment = {
        **os.environ,
        "FEDTIDE_NODE": "alone",
        "FEDTIDE_REGION": "eu",
        "FEDTIDE_NATS_URL": "nats://127.0.0.1:1",
        "FEDTIDE_DATA_DIR": str(tmp_path),
        "FEDTIDE_HTTP_PORT": str(port),
    }
    agent = subprocess.Popen([sys.executable, "-m", "fedtide.edge_agent"], env=environment, stderr=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}/v2/models/scale/infer"

    def answered() -> bool:
        try:
            asked = urllib.request.Request(url, json.dumps(_request([1, 2, 3])).encode(), JSON)
            with urllib.request.urlopen(asked, timeout=5) as response:
                got = json.loads(response.read())
        except OSError:
            return False
        return bool((got["model_version"], got["outputs"][0]["data"]) == (version, answer))

    try:
        until(answered, "an answer")
    finally:
        agent.terminate()
        assert agent.wait(20) == 0
