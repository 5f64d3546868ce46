"""From an event at the webhook to the first node that starts its trainer, by phases.

Everything is up and quiet; each sample is one event that starts one run of an app that does
nothing. Flower has no triggers: the peer is `flwr run`, from its command to the first line of the
ClientApp (it starts two processes in between; ours forks the aggregator from one that is ready).
"""

from __future__ import annotations

import json
import os
import re
import statistics
import subprocess
import tempfile
import time
import urllib.request
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks.bench_round_overhead import BIN, superlink
from benchmarks.report import Row, load_now, write
from fedtide.console.home import Home

APP = Path(__file__).parent / "echo_app"
SAMPLES = 15
PEER_SAMPLES = 3
PAUSE_S = 3.0
"""Between samples: the run before is cleaned up."""
PHASES = ("event logged", "run requested", "aggregator has it", "round opened", "trainer starts")
WAIT_S = 120.0
_LOG_TIME = "%Y-%m-%d %H:%M:%S,%f"


def main() -> None:
    load = load_now()
    samples = _ours()
    peer = _flower()
    rows = []
    for index, phase in enumerate(PHASES):
        steps = [1000 * (b - a) for a, b in (list(pairwise(s))[index] for s in samples)]
        rows.append(Row("event to trainer", phase, "ms", statistics.median(steps), None, ""))
    totals = sorted(1000 * (s[-1] - s[0]) for s in samples)
    note = (
        f"{SAMPLES} samples, best {totals[0]:.0f}, worst {totals[-1]:.0f}; peer from `flwr run`, {PEER_SAMPLES} samples"
    )
    name = "flower-superlink + flower-supernode"
    rows.append(Row("event to trainer", "all, median", "ms", statistics.median(totals), 1000 * peer, name, note))
    write("trigger_latency", load, rows)


def _ours() -> list[list[float]]:
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "FEDTIDE_HOME": folder}
        fedtide = [str(BIN / "fedtide")]
        up = [*fedtide, "up", "-d", "--regions", "bench", "--nodes-per-region", "2"]
        subprocess.run(up, env=environment, check=True, stdout=subprocess.DEVNULL)
        try:
            api = json.loads(Path(folder, "up.json").read_text())["apis"][0]
            _apply_rule(fedtide, environment, Path(folder))
            _sample(api, Path(folder), "warm-up")
            return [_sample(api, Path(folder), str(number)) for number in range(SAMPLES)]
        finally:
            subprocess.run([*fedtide, "down"], env=environment, check=True, stdout=subprocess.DEVNULL)


def _apply_rule(fedtide: list[str], environment: dict[str, str], folder: Path) -> None:
    config = {"kilobytes": 4, "rounds": 1, "nodes": 2, "report": str(folder / "rounds.json")}
    do = {"kind": "run", "app": str(APP), "run_config": config, "policy": {"min_updates": 0}}
    rule = folder / "rule.yaml"
    rule.write_text(json.dumps({"name": "bench", "on": "bench", "policy": "queue", "do": do}))  # JSON is YAML
    subprocess.run([*fedtide, "trigger", "apply", str(rule)], env=environment, check=True, stdout=subprocess.DEVNULL)


def _sample(api: str, folder: Path, key: str) -> list[float]:
    """The moments of one event's way, in Unix seconds: sent, then one for each of PHASES."""
    time.sleep(PAUSE_S)  # a quiet machine is part of the measurement, see PAUSE_S
    headers = {"Content-Type": "application/json", "ce-specversion": "1.0", "ce-source": "bench"}
    headers |= {"ce-type": "bench", "ce-id": key, **_shown(folder)}
    sent = time.time()
    with urllib.request.urlopen(urllib.request.Request(f"{api}/v1/events", b"{}", headers), timeout=30):
        pass
    wanted = ("signal.received", "run.requested", "run.aggregator_started", "round.opened")
    run = _until(lambda: _run_of(api, folder, key))
    _until(lambda: _get(api, folder, f"/v1/runs/{run}")["state"] == "completed")
    events = [e for e in _get(api, folder, "/v1/events?limit=60")["items"] if _unix(e) >= sent]
    moments = [min(_unix(e) for e in events if e["data"]["kind"] == kind) for kind in wanted]
    return [sent, *moments, _first_training(folder, run)]


def _shown(folder: Path) -> dict[str, str]:
    return {"Authorization": f"Bearer {Home(folder).api_token_file.read_text()}"}


def _run_of(api: str, folder: Path, key: str) -> str | None:
    for event in _get(api, folder, "/v1/events?kind=run.requested&limit=1")["items"]:
        if event["data"]["cause"].endswith(f"#{key}"):
            return str(event["data"]["run"])
    return None


def _first_training(folder: Path, run: str) -> float:
    """When an agent handed a task of the run to its trainer, by the agents' logs."""
    line = re.compile(rf"^(\S+ \S+) INFO .* task\.training task={run}-", re.MULTILINE)
    logs = [file.read_text() for file in (folder / "logs").glob("agent-*.log")]
    return min(datetime.strptime(at, _LOG_TIME).astimezone(UTC).timestamp() for log in logs for at in line.findall(log))


def _flower() -> float:
    """Seconds from `flwr run` to the first line of a ClientApp, median."""
    took = []
    for _ in range(PEER_SAMPLES):
        with tempfile.TemporaryDirectory() as folder, superlink(Path(folder)) as (environment, _):
            time.sleep(
                PAUSE_S
            )  # Flower's engine has no word for "all SuperNodes are connected": it gets as long as ours has
            began = time.time()
            report = Path(folder, "rounds.json")
            config = f"kilobytes=4 rounds=1 report='{report}' mark='{Path(folder, 'mark')}'"
            command = [str(BIN / "flwr"), "run", str(APP), "bench", "--run-config", config]
            subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL, timeout=60)
            took.append(float(_until(lambda f=folder: _marked(Path(f, "mark")))) - began)
    return statistics.median(took)


def _marked(file: Path) -> str | None:
    return file.read_text() if file.exists() and file.read_text() else None


def _unix(event: dict[str, Any]) -> float:
    return datetime.fromisoformat(event["time"]).timestamp()


def _get(api: str, folder: Path, path: str) -> Any:
    asked = urllib.request.Request(f"{api}{path}", headers=_shown(folder))
    with urllib.request.urlopen(asked, timeout=30) as answer:
        return json.load(answer)


def _until(found: Any) -> Any:
    deadline = time.monotonic() + WAIT_S
    while not (value := found()):
        if time.monotonic() > deadline:
            raise TimeoutError("what the benchmark waits for did not come about")
        time.sleep(0.05)  # after what is measured has happened: its moments are read from logs
    return value


if __name__ == "__main__":
    main()
