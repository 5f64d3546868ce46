"""Seconds a round and peak memory of an app that does not train: ours against Flower's own engine.

The same app, four nodes; small (4 kB) and large (40 MB) messages. One system after the other,
each with its own processes; the median round after the first (which starts the apps' processes).
Small ones also against ours without a sandbox for apps.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.process_memory import PeakMemory, tree
from benchmarks.report import Row, load_now, write

APP = Path(__file__).parent / "echo_app"
NODES = 4
SMALL = "4 nodes x 4 kB"
TURNS, ROUNDS_OF_TURN = 5, 60
CASES = {SMALL: (4, 6), "4 nodes x 40 MB": (40_000, 4)}
BIN = Path(sys.executable).parent
WAIT_S = 600.0


def main() -> None:
    load = load_now()
    ours = {case: _ours(*numbers) for case, numbers in CASES.items()}
    flower = {case: _flower(*numbers) for case, numbers in CASES.items()}
    rows = []
    for case in CASES:
        (our_rounds, our_peak), (their_rounds, their_peak) = ours[case], flower[case]
        note = f"first round {our_rounds[0]:.2f} s / {their_rounds[0]:.2f} s"
        name = "flower-superlink + flower-supernode"
        ours_s, theirs_s = statistics.median(our_rounds[1:]), statistics.median(their_rounds[1:])
        rows.append(Row(case, "round, median", "s", ours_s, theirs_s, name, note))
        rows.append(Row(case, "peak memory, all processes", "MB", our_peak / 1e6, their_peak / 1e6, name))
    write("round_overhead", load, [*rows, _confined()])


def _confined() -> Row:
    """What it costs that apps are kept in: the same with and without, in turn."""
    kilobytes, _ = CASES[SMALL]
    found: dict[str, list[float]] = {"auto": [], "off": []}
    for _ in range(TURNS):
        for sandbox, medians in found.items():
            rounds, _ = _ours(kilobytes, ROUNDS_OF_TURN, "--agent-set", f"sandbox={sandbox}")
            medians.append(statistics.median(rounds[5:]))
    kept, free = (statistics.median(medians) for medians in found.values())
    return Row(f"{SMALL}, apps confined", "round, median", "s", kept, free, "sandbox=off")


def _ours(kilobytes: int, rounds: int, *options: str) -> tuple[list[float], int]:
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "FEDTIDE_HOME": folder}
        fedtide = [str(BIN / "fedtide")]
        up = [*fedtide, "up", "-d", "--regions", "bench", "--nodes-per-region", str(NODES), *options]
        subprocess.run(up, env=environment, check=True, stdout=subprocess.DEVNULL)
        pid = json.loads(Path(folder, "up.json").read_text())["pid"]
        try:
            report = Path(folder, "rounds.json")
            settings = [f"--set=kilobytes={kilobytes}", f"--set=rounds={rounds}", f"--set=report={report}"]
            with PeakMemory(pid) as memory:
                command = [*fedtide, "run", "start", "--app", str(APP), *settings, "--watch"]
                subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL, timeout=WAIT_S)
            return json.loads(report.read_text()), memory.peak_bytes
        finally:
            subprocess.run([*fedtide, "down"], env=environment, check=True, stdout=subprocess.DEVNULL)


def _flower(kilobytes: int, rounds: int) -> tuple[list[float], int]:
    with tempfile.TemporaryDirectory() as folder, superlink(Path(folder)) as (environment, root):
        report = Path(folder, "rounds.json")
        config = f"kilobytes={kilobytes} rounds={rounds} report='{report}'"
        app = Path(folder, "app")
        shutil.copytree(APP, app)
        with PeakMemory(root) as memory:
            command = [str(BIN / "flwr"), "run", str(app), "bench", "--run-config", config]
            subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL, timeout=60)
            _wait_for(report)
        return json.loads(report.read_text()), memory.peak_bytes


@contextmanager
def superlink(folder: Path) -> Iterator[tuple[dict[str, str], int]]:
    """A SuperLink and its SuperNodes as children of one shell, so that one tree holds them all."""
    home = folder / "flwr"
    home.mkdir()
    port, *node_ports = _free_ports(1 + NODES)
    environment = {
        **os.environ,
        "FLWR_HOME": str(home),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "PATH": f"{BIN}:{os.environ['PATH']}",
    }
    (home / "config.toml").write_text(
        f'[superlink]\ndefault = "bench"\n\n[superlink.bench]\naddress = "127.0.0.1:{port}"\ninsecure = true\n'
    )
    commands = [f"flower-superlink --insecure --disable-runtime-dependency-installation --host 127.0.0.1 --port {port}"]
    for index, node_port in enumerate(node_ports):
        commands.append(
            f"flower-supernode --insecure --superlink 127.0.0.1:{port} "
            f"--host 127.0.0.1 --port {node_port} --node-config 'partition-id={index} num-partitions={NODES}'"
        )
    script = "\n".join(f"{c} >{folder}/{i}.log 2>&1 &" for i, c in enumerate(commands)) + "\nwait\n"
    shell = subprocess.Popen(["bash", "-c", script], env=environment, start_new_session=True)
    try:
        _wait_until_open(port)
        yield environment, shell.pid
    finally:
        processes = tree(shell.pid)
        os.killpg(shell.pid, signal.SIGTERM)
        shell.wait()
        _wait_until_gone(processes)


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def _wait_until_open(port: int) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.2)
    raise TimeoutError(f"nothing listens on {port}")


def _wait_until_gone(processes: list[int]) -> None:
    """The next measurement must not share the machine with what is still ending; what does not end is killed."""
    deadline = time.monotonic() + 20
    while left := [p for p in processes if Path(f"/proc/{p}").exists()]:
        if time.monotonic() > deadline:
            for pid in left:
                os.kill(pid, signal.SIGKILL)
            return
        time.sleep(0.1)  # not our children: nothing tells that they are gone but looking


def _wait_for(file: Path) -> None:
    deadline = time.monotonic() + WAIT_S
    while not (file.exists() and file.read_text().endswith("]")):
        if time.monotonic() > deadline:
            raise TimeoutError(f"{file.name} was not written")
        time.sleep(0.2)


if __name__ == "__main__":
    main()
