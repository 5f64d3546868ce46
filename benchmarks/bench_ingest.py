"""From the socket to the folded sum: speed against a raw loopback connection, CPU against Flower's engine.

Ours: a real nats-server holds 8 updates of 40 MB; they are read, checked and folded as an aggregator does. CPU is
that of this process and of the server, per GB of updates. Raw: a process sends the same bytes over a loopback socket.
Flower: superlink and server app (not the nodes) while 4 nodes echo 40 MB; per GB that they moved, both ways.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from benchmarks.bench_round_overhead import APP, BIN, superlink
from benchmarks.hub import hub
from benchmarks.process_memory import tree
from benchmarks.report import Row, load_now, write
from fedtide.aggregation.sums.agreement import Agreement
from fedtide.aggregation.sums.round_sum import RoundSum, Weight
from fedtide.coordinator.adapters.topology import Topology
from fedtide.fabric.nats.broker import Broker
from fedtide.fabric.nats.subjects import UP, Subjects
from fedtide.fabric.nats.transfer import Source, put_blob, stream_blob
from fedtide.fabric.tensors.blobs import BlobRef
from fedtide.fabric.tensors.frame import Tensor, encode

UPDATES, ELEMENTS = 8, 10_000_000
GIGABYTES = UPDATES * ELEMENTS * 4 / 1e9
SUBJECTS = Subjects()
TICK = os.sysconf("SC_CLK_TCK")
FLOWER_ROUNDS, FLOWER_NODES = 3, 4

_SENDER = """
import socket, sys
connection = socket.create_connection(("127.0.0.1", int(sys.argv[1])))
chunk, left = bytes(1 << 20), int(sys.argv[2])
while left > 0:
    connection.sendall(chunk[:left])
    left -= len(chunk)
"""


def _cpu_s(pid: int) -> float:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / TICK


def _raw() -> tuple[float, float]:
    """(GB/s, CPU-seconds per GB) of receiving over loopback into one buffer."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port, size = listener.getsockname()[1], int(GIGABYTES * 1e9)
        sender = subprocess.Popen([sys.executable, "-c", _SENDER, str(port), str(size)])
        connection, _ = listener.accept()
        buffer, got = bytearray(1 << 20), 0
        began, cpu = time.perf_counter(), time.process_time()
        while got < size:
            got += connection.recv_into(buffer)
        seconds = time.perf_counter() - began
        sender.wait()
        return GIGABYTES / seconds, (time.process_time() - cpu) / GIGABYTES


async def _ours(url: str, server: int) -> tuple[float, float]:
    broker = await Broker.connect(url, "bench", wait_s=30)
    await Topology(broker, SUBJECTS, []).ensure_hub()
    rng = np.random.default_rng(0)
    base = [Tensor.of("w", rng.standard_normal(ELEMENTS, dtype=np.float32))]

    def prefix(digest: str) -> str:
        return SUBJECTS.update_blob("hub", "node", "run", digest)

    refs: list[BlobRef] = []
    for _ in range(UPDATES):
        update = [Tensor.of("w", rng.standard_normal(ELEMENTS, dtype=np.float32))]
        refs.append(await put_blob(broker, prefix, UP, encode(update), ttl_s=600))
    total = RoundSum(Agreement.of(base, UPDATES))
    began, cpu = time.perf_counter(), time.process_time() + _cpu_s(server)
    for number, ref in enumerate(refs):
        incoming = total.expect(str(number), Weight(1.0, 1.0), ref.size_bytes)
        async for chunk in stream_blob(Source(broker, UP), prefix, ref):
            assert await asyncio.to_thread(incoming.feed, chunk) is None
        incoming.accept()
    seconds = time.perf_counter() - began
    used = time.process_time() + _cpu_s(server) - cpu
    await broker.close()
    return GIGABYTES / seconds, used / GIGABYTES


def _with_server() -> tuple[float, float]:
    with hub() as (url, pid):
        return asyncio.run(_ours(url, pid))


def _flower() -> float:
    """CPU-seconds of Flower's server side per GB moved."""
    with tempfile.TemporaryDirectory() as folder, superlink(Path(folder)) as (environment, root):
        report = Path(folder, "rounds.json")
        app = Path(folder, "app")
        shutil.copytree(APP, app)
        config = f"kilobytes=40000 rounds={FLOWER_ROUNDS} report='{report}'"
        command = [str(BIN / "flwr"), "run", str(app), "bench", "--run-config", config]
        # Start-up is not what is measured: the first look comes when the nodes are there.
        subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL, timeout=60)
        seen: dict[int, float] = {}
        first: dict[int, float] = {}
        while not (report.exists() and report.read_text().endswith("]")):
            for pid in _server_side(root):
                used = _cpu_s(pid)
                first.setdefault(pid, used)
                seen[pid] = max(seen.get(pid, 0.0), used)
            time.sleep(0.2)  # foreign processes come and go: nothing tells but looking
        gigabytes = len(json.loads(report.read_text())) * FLOWER_NODES * 2 * 40_000_000 / 1e9
        return sum(seen[pid] - first[pid] for pid in seen) / gigabytes


def _server_side(root: int) -> list[int]:
    found = []
    for pid in tree(root):
        try:
            command = Path(f"/proc/{pid}/cmdline").read_text()
        except OSError:
            continue
        if "superlink" in command or "serverapp" in command:
            found.append(pid)
    return found


def main() -> None:
    load = load_now()
    ours = sorted(_with_server() for _ in range(3))[1]
    raw = sorted(_raw() for _ in range(3))[1]
    flower = _flower()
    case = f"{UPDATES} x {ELEMENTS} float32"
    write(
        "ingest",
        load,
        [
            Row(case, "socket to folded", "GB/s", ours[0], raw[0], "raw loopback"),
            Row(case, "CPU", "s/GB", ours[1], raw[1], "raw loopback, receiver", "with nats-server's"),
            Row(case, "CPU", "s/GB", ours[1], flower, "superlink + server app", "with nats-server's"),
        ],
    )


if __name__ == "__main__":
    main()
