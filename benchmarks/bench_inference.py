"""What serving adds to ONNX Runtime, and whether a release may be swapped under load.

One real node of a real installation. First requests of one row, one after the other, over one
connection with binary tensors, against `InferenceSession.run` in a bare process; then 500 requests a
second while ten roll-outs replace the release: how many fail, and whether every answer is of one.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

from benchmarks.bench_round_overhead import BIN
from benchmarks.report import Row, load_now, write
from fedtide.console import endpoints
from fedtide.console.client import Client
from fedtide.console.home import Home
from fedtide.fabric.plans.rollout_request import RolloutRequest
from fedtide.fabric.tensors.frame import Tensor, encode
from tests.hub import Hub
from tests.integration.installation import until
from tests.integration.releases import publish

MODELS: dict[str, tuple[int, ...]] = {"mlp": (64,), "cnn": (3, 32, 32)}
"""The shape of one row: a perceptron that takes hundredths of a millisecond, and a small convolutional network."""
WIDTH = 128
REQUESTS = 2000
SWAPS = 10
RATE = 500
CONNECTIONS = 8
IDLE_S = 20.0
PAUSE_S = 1.0
"""Between two swaps: the load goes on all the time."""


def main() -> None:
    load = load_now()
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "FEDTIDE_HOME": folder}
        up = [str(BIN / "fedtide"), "up", "-d", "--regions", "bench", "--nodes-per-region", "1"]
        subprocess.run(up, env=environment, check=True, stdout=subprocess.DEVNULL)
        try:
            state = json.loads(Path(folder, "up.json").read_text())
            client, hub = Client.of(Home(Path(folder)), state["apis"]), Hub.of(Home(Path(folder)), state["hub_url"])
            roll_out(client, hub, "mlp", 1)
            rows += idle(client)
            for name in MODELS:
                if name != "mlp":
                    roll_out(client, hub, name, 1)
                rows += compare(name, address(client))
            rows += swaps(client, hub, address(client))
        finally:
            subprocess.run([str(BIN / "fedtide"), "down"], env=environment, check=False, stdout=subprocess.DEVNULL)
    write("inference", load, rows)


def idle(client: Client) -> list[Row]:
    """Memory and CPU time of the agent while nobody asks it anything, with a small model loaded."""
    (pid,) = (int(p.name) for p in Path("/proc").iterdir() if p.name.isdigit() and _is_agent(p))
    ticks = os.sysconf("SC_CLK_TCK")

    def cpu_s() -> float:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / ticks

    time.sleep(5)  # what its start and the roll-out left to do is done
    used = cpu_s()
    time.sleep(IDLE_S)  # what is measured is that nothing happens
    share = 100 * (cpu_s() - used) / IDLE_S
    resident = (client.send(endpoints.nodes()).items[0].rss_bytes or 0) / 1e6
    return [
        Row("idle agent", "resident", "MB", resident, None, "", "goal 80"),
        Row("idle agent", "CPU of one core", "%", share, None, "", "heartbeats every 2 s"),
    ]


def _is_agent(process: Path) -> bool:
    try:
        return b"agent-bench-1.json" in (process / "cmdline").read_bytes()
    except OSError:
        return False


def graph(name: str, version: int) -> bytes:
    """A classifier of ten classes whose output also holds its own version, in an eleventh column."""
    rng = np.random.default_rng(1)
    last = rng.normal(0, 0.1, (WIDTH, 11))
    last[:, 10] = 0
    weights = {"w": last, "b": np.array([0.0] * 10 + [version])}
    if name == "mlp":
        weights["w1"] = rng.normal(0, 0.1, (MODELS[name][0], WIDTH))
        nodes = [helper.make_node("MatMul", ["x", "w1"], ["a"]), helper.make_node("Relu", ["a"], ["h"])]
    else:
        weights["k1"], weights["k2"] = rng.normal(0, 0.1, (32, 3, 3, 3)), rng.normal(0, 0.1, (WIDTH, 32, 3, 3))
        nodes = [
            helper.make_node("Conv", ["x", "k1"], ["c1"], strides=[2, 2]),
            helper.make_node("Relu", ["c1"], ["r1"]),
            helper.make_node("Conv", ["r1", "k2"], ["c2"], strides=[2, 2]),
            helper.make_node("Relu", ["c2"], ["r2"]),
            helper.make_node("GlobalAveragePool", ["r2"], ["p"]),
            helper.make_node("Flatten", ["p"], ["h"]),
        ]
    nodes += [helper.make_node("MatMul", ["h", "w"], ["c"]), helper.make_node("Add", ["c", "b"], ["y"])]
    constants = [numpy_helper.from_array(w.astype(np.float32), n) for n, w in weights.items()]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", *MODELS[name]])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 11])
    body = helper.make_graph(nodes, name, [x], [y], constants)
    return bytes(helper.make_model(body, opset_imports=[helper.make_opsetid("", 17)], ir_version=9).SerializeToString())


def session(content: bytes) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])


def roll_out(client: Client, hub: Hub, name: str, version: int) -> None:
    content = graph(name, version)
    x = np.ones((1, *MODELS[name]), np.float32)
    (y,) = session(content).run(None, {"x": x})
    asyncio.run(publish(hub, version, content, encode([Tensor.of("in.x", x), Tensor.of("out.y", y)]), model=name))

    def there() -> bool:
        return any(m.model == name and m.latest == version for m in client.every(endpoints.models()))

    until(there, "the release")
    started = client.send(endpoints.start_rollout(RolloutRequest(model=name)))
    *_, view = client.stream(endpoints.watch_rollout(started.rollout))
    assert view.state == "completed", view


def address(client: Client) -> tuple[str, int]:
    parts = urlsplit(client.send(endpoints.nodes()).items[0].inference_url)
    return str(parts.hostname), int(parts.port or 0)


def request(name: str, row: np.ndarray[Any, Any]) -> bytes:
    shape = list(row.shape)
    tensor = {"name": "x", "datatype": "FP32", "shape": shape, "parameters": {"binary_data_size": row.nbytes}}
    head = json.dumps({"inputs": [tensor], "parameters": {"binary_data_output": True}}).encode()
    lines = [
        f"POST /v2/models/{name}/infer HTTP/1.1",
        "Host: bench",
        f"Content-Length: {len(head) + row.nbytes}",
        f"Inference-Header-Content-Length: {len(head)}",
    ]
    return "\r\n".join([*lines, "", ""]).encode() + head + row.tobytes()


def compare(name: str, where: tuple[str, int]) -> list[Row]:
    """Served against bare, in turn, five times each; medians of the percentiles."""
    row = np.ones((1, *MODELS[name]), np.float32)
    bare_session, ask = session(graph(name, 1)), request(name, row)
    connection = socket.create_connection(where)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    bare, served = [], []
    for _ in range(5):
        bare.append(_percentiles(lambda: bare_session.run(None, {"x": row})))
        served.append(_percentiles(lambda: _exchange(connection, ask)))
    connection.close()
    rows = []
    for index, percentile in enumerate(("p50", "p99")):
        ours, peer = (float(np.median([p[index] for p in each])) for each in (served, bare))
        allowed = 1.1 * peer + 0.3
        note = f"adds {ours - peer:.3f} ms, allowed {allowed - peer:.3f}"
        rows.append(Row(f"{name}, one row", percentile, "ms", ours, peer, "bare ONNX Runtime", note))
    return rows


def _percentiles(do: Any) -> tuple[float, float]:
    took = []
    for _ in range(REQUESTS):
        began = time.perf_counter()
        do()
        took.append(1000 * (time.perf_counter() - began))
    return float(np.percentile(took, 50)), float(np.percentile(took, 99))


def _exchange(connection: socket.socket, ask: bytes) -> None:
    connection.sendall(ask)
    answer = connection.recv(65536)
    assert answer.startswith(b"HTTP/1.1 200"), answer


def swaps(client: Client, hub: Hub, where: tuple[str, int]) -> list[Row]:
    results: Counter[str] = Counter()
    took: list[float] = []

    async def run() -> None:
        stop = asyncio.Event()
        load = [asyncio.create_task(_load(n, where, stop, results, took)) for n in range(CONNECTIONS)]
        for version in range(2, SWAPS + 2):
            await asyncio.to_thread(roll_out, client, hub, "mlp", version)
            await asyncio.sleep(PAUSE_S)
        stop.set()
        await asyncio.gather(*load)

    asyncio.run(run())
    versions = sum(key.startswith("v") for key in results)
    count = len(took)
    note = f"{count} requests, {versions} versions seen, {results['mixed']} mixed"
    case = f"{RATE}/s, {SWAPS} swaps"
    return [
        Row(case, "dropped", "requests", results["failed"], None, "", note),
        Row(case, "p50", "ms", float(np.percentile(took, 50)), None, ""),
        Row(case, "p99", "ms", float(np.percentile(took, 99)), None, ""),
    ]


async def _load(
    number: int, where: tuple[str, int], stop: asyncio.Event, results: Counter[str], took: list[float]
) -> None:
    """One connection's share of the rate. Two rows a request: both must be of one version."""
    reader, writer = await asyncio.open_connection(*where)
    ask = request("mlp", np.ones((2, *MODELS["mlp"]), np.float32))
    due = time.perf_counter() + number / RATE
    while not stop.is_set():
        due += CONNECTIONS / RATE
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
        began = time.perf_counter()
        writer.write(ask)
        head = await reader.readuntil(b"\r\n\r\n")
        (length,) = (int(h.split()[1]) for h in head.split(b"\r\n") if h.lower().startswith(b"content-length"))
        body = await reader.readexactly(length)
        took.append(1000 * (time.perf_counter() - began))
        if not head.startswith(b"HTTP/1.1 200"):
            results["failed"] += 1
            continue
        said = np.frombuffer(body[-2 * 11 * 4 :], np.float32).reshape(2, 11)[:, 10]
        named = json.loads(body[: len(body) - 2 * 11 * 4])["model_version"]
        results["mixed" if {float(named)} != set(said.tolist()) else f"v{named}"] += 1
    writer.close()


if __name__ == "__main__":
    main()
