"""A whole embedded installation for tests, driven through the CLI as a user would."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from io import BytesIO, TextIOWrapper
from pathlib import Path
from typing import Any

from fedtide.console import endpoints
from fedtide.console.cli import __main__ as cli
from fedtide.console.client import Client
from fedtide.console.home import Home
from fedtide.fabric.messages.views import RUN_ENDED, EventView, ModelView, NodeView, RolloutView, RunView
from tests.hub import Hub

_ONE_AT_A_TIME = threading.RLock()


@contextmanager
def _environment(home: Path, tenant: str = "") -> Iterator[None]:
    before = dict(os.environ)
    for name in [n for n in os.environ if n.startswith("FEDTIDE_")]:
        del os.environ[name]
    os.environ["FEDTIDE_HOME"] = str(home)
    if tenant:
        os.environ["FEDTIDE_TENANT"] = tenant
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


@contextmanager
def _arguments(words: Iterable[str]) -> Iterator[None]:
    before, sys.argv = sys.argv, ["fedtide", *words]
    try:
        yield
    finally:
        sys.argv = before


@contextmanager
def _captured() -> Iterator[tuple[TextIOWrapper, TextIOWrapper]]:
    out, err = TextIOWrapper(BytesIO(), "utf-8"), TextIOWrapper(BytesIO(), "utf-8")
    with redirect_stdout(out), redirect_stderr(err):
        yield out, err


def _text(stream: TextIOWrapper) -> str:
    stream.seek(0)
    return stream.read()


@dataclass(frozen=True)
class Installation:
    """`tenant`: whose commands these are; empty: the installation's own."""

    home: Path
    tenant: str = ""

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """`fedtide ...` in this home, in this process: its imports are most of what a command costs."""
        with _ONE_AT_A_TIME, _environment(self.home, self.tenant), _arguments(arguments), _captured() as (out, err):
            code = cli.main()
        return subprocess.CompletedProcess(arguments, code, _text(out), _text(err))

    def process(self, *arguments: str, timeout_s: float = 90) -> subprocess.CompletedProcess[str]:
        """`fedtide ...` in this home as a process of its own."""
        command = [sys.executable, "-m", "fedtide.console.cli", *arguments]
        with _environment(self.home, self.tenant):
            return subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False)

    def json(self, *arguments: str) -> Any:
        done = self.run(*arguments, "-o", "json")
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    @property
    def client(self) -> Client:
        return Client.of(Home(self.home, self.tenant), self.state["apis"], by="test")

    @property
    def shown(self) -> dict[str, str]:
        """The header that callers of the API must show."""
        return {"Authorization": f"Bearer {Home(self.home, self.tenant).api_token_file.read_text()}"}

    def show(self, run: str) -> RunView:
        return self.client.send(endpoints.run(run))

    def runs(self) -> list[RunView]:
        return list(self.client.every(endpoints.runs()))

    def rollout(self, key: str) -> RolloutView:
        return self.client.send(endpoints.rollout(key))

    def rollouts(self) -> list[RolloutView]:
        return list(self.client.every(endpoints.rollouts()))

    def model(self, name: str) -> ModelView:
        return self.client.send(endpoints.model(name))

    def node(self, name: str) -> NodeView:
        return self.client.send(endpoints.node(name))

    def nodes(self) -> list[NodeView]:
        return list(self.client.every(endpoints.nodes()))

    def events(self, about: str = "", kind: str = "", limit: int = 1000) -> list[EventView]:
        return self.client.send(endpoints.events(about=about, kind=kind, limit=limit)).items

    def until_events(self, kind: str, about: str = "", count: int = 1, timeout_s: float = 60) -> list[EventView]:
        """The events of a kind once there are `count`, as the API tells them."""
        deadline = time.monotonic() + timeout_s
        while len(found := self.events(about=about, kind=kind)) < count:
            assert time.monotonic() < deadline, f"{len(found)} of {count} {kind} in {timeout_s} s"
            # The next one, or one that came between the two questions: that is asked for again after a second.
            next(iter(self.client.stream(endpoints.watch_events(kind, about), timeout_s=1.0)), None)
        return found

    def until_run(self, run: str, holds: Callable[[RunView], bool]) -> RunView:
        """The first view of a run for which `holds`, as the API tells it: no polling."""
        for view in self.client.stream(endpoints.watch_run(run), timeout_s=90):
            if holds(view):
                return view
        raise AssertionError(f"{run} never came so far: {self.show(run)}")

    def finish(self, run: str) -> RunView:
        """Wait for a run to end; its view."""
        return self.until_run(run, lambda view: view.state in RUN_ENDED)

    def train(self, app: Path, *options: str) -> RunView:
        return self.finish(self.json("run", "start", "--app", str(app), *options)["run"])

    def out(self, run: str) -> Path:
        """The folder that was the ServerApp's working directory."""
        return self.home / "coordinator" / "runs" / run / "out"

    def child(self, name: str) -> int:
        """The pid of one of the installation's processes: `hub`, `leaf-eu`, `coordinator`, `agent-eu-1`, ..."""
        word = {"hub": "config/hub.conf", "coordinator": "config/coordinator.json"}.get(name)
        if word is None:
            word = f"config/{name}.conf" if name.startswith("leaf-") else f"config/{name}.json"
        (pid,) = children(self.state["pid"], word)
        return pid

    def aggregator(self, run: str) -> int:
        """The pid of a run's aggregator."""
        note = json.loads((self.home / "coordinator" / "runs" / run / "aggregator.pid").read_text())
        pid: int = note["pid"]
        return pid

    def leaf(self, region: str) -> str:
        """Where the nodes of a region connect."""
        url: str = json.loads((self.home / "config" / f"agent-{region}-1.json").read_text())["nats_url"]
        return url

    @property
    def hub(self) -> Hub:
        return Hub.of(Home(self.home), self.state["hub_url"])

    @property
    def state(self) -> dict[str, Any]:
        state: dict[str, Any] = json.loads((self.home / "up.json").read_text())
        return state


def until(holds: Callable[[], bool], what: str, timeout_s: float = 60) -> None:
    """Wait for something that only a foreign process can bring about."""
    deadline = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < deadline, f"{what} did not come about in {timeout_s} s"
        time.sleep(0.05)


def children(parent: int, word: str) -> list[int]:
    """Processes below `parent` whose command line holds `word`."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            fields = (entry / "stat").read_text().rsplit(")", 1)[1].split()
            if entry.name.isdigit() and int(fields[1]) == parent and word in (entry / "cmdline").read_text():
                found.append(int(entry.name))
        except OSError:
            continue
    return found
