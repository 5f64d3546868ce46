"""Both charts as real processes: rendered by Helm, with the files, arguments and Secrets that their pods would have.

Only what a cluster does is played here: paths and addresses become those of this machine, and whoever
creates a Job is given its pod as a process.
"""

from __future__ import annotations

import base64
import json
import os
import shutil
import socket
import ssl
import subprocess
import sys
import threading
import urllib.request
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from fedtide.console import endpoints
from fedtide.console.client import Client
from fedtide.console.embedded.plan import free_ports, nats_server
from fedtide.console.servers import Servers
from fedtide.coordinator.identity.installation_secrets import API_TOKEN, Wants, complete
from fedtide.edge_agent.identity.region_renewal import prepared
from fedtide.fabric.errors import FedtideError
from fedtide.fabric.messages.requests import TokenRequest
from tests.cluster.api_server import ApiServer
from tests.cluster.test_charts import CLOUD, EDGE, render
from tests.conftest import APPS
from tests.integration.installation import until
from tests.quiet.test_nothing_calls_home import GUARD

NO_HOME = "/proc/no-home"
"""A pod's home: nothing can be written there, by whomever."""


class Machine:
    """One machine that plays all nodes: `files` is where each pod's mounts are."""

    def __init__(self, folder: Path, cloud: str = "ft", edge: str = "ft", namespace: str = "fl") -> None:
        self.folder = folder
        self.cloud, self.edge, self.namespace = cloud, edge, namespace
        self.leaf_host = f"{edge}-leaf.{namespace}.svc"
        self.processes: list[subprocess.Popen[bytes]] = []
        self.api_server = ApiServer().__enter__()
        names = ("client", "leaf_port", "api", "leaf_client", "monitor", "leaf_monitor")
        self.ports = dict(zip(names, free_ports(len(names)), strict=True))
        self.quiet_log = folder / "quiet.log"
        (folder / "tmp").mkdir()
        self.environment = {
            **os.environ,
            "KUBECONFIG": str(self.api_server.kubeconfig_in(folder)),
            "HOME": NO_HOME,
            "TMPDIR": str(folder / "tmp"),
            "PYTHONPATH": str(GUARD),
            "QUIET_LOG": str(self.quiet_log),
        }
        self.hub: subprocess.Popen[bytes]
        self.leaf: subprocess.Popen[bytes]
        self.edge_values: dict[str, Any] = {}
        self.region: dict[str, str] = {}
        self.own: dict[str, str] = {}
        self.servers: dict[str, str] = {}

    def here(self, text: str, pod: str) -> str:
        """Paths and addresses of a pod as those of this machine."""
        ports = self.ports
        for theirs, ours in {
            "/etc/": f"{self.folder}/{pod}/etc/",
            "/data/": f"{self.folder}/{pod}/data/",
            "/var/lib/fedtide": f"{self.folder}/{pod}/lib",
            f"tls://{self.cloud}-nats.{self.namespace}.svc:4222": f"tls://127.0.0.1:{ports['client']}",
            f"tls://{self.leaf_host}:4222": f"tls://127.0.0.1:{ports['leaf_client']}",
            "tls://hub.example.com:7422": f"tls://127.0.0.1:{ports['leaf_port']}",
            "tls://hub.example.com:30422": f"tls://127.0.0.1:{ports['leaf_port']}",
            "0.0.0.0:4222": f"127.0.0.1:{ports['client' if pod == 'hub' else 'leaf_client']}",
            "0.0.0.0:7422": f"127.0.0.1:{ports['leaf_port']}",
            "127.0.0.1:8222": f"127.0.0.1:{ports['monitor' if pod == 'hub' else 'leaf_monitor']}",
            '"http_port": 8443': f'"http_port": {ports["api"]}',
            '"http_port": 8080': '"http_port": 0',
            '"0.0.0.0"': '"127.0.0.1"',
        }.items():
            text = text.replace(theirs, ours)
        return text

    def mount(self, pod: str, place: str, files: dict[str, str]) -> Path:
        target = self.folder / pod / place
        target.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            (target / name).write_text(self.here(text, pod) if name.endswith((".json", ".conf")) else text)
        return target

    def start(self, name: str, *argv: str, **more: str) -> subprocess.Popen[bytes]:
        with (self.folder / f"{name}.log").open("ab") as log:
            process = subprocess.Popen(argv, env={**self.environment, **more}, stdout=log, stderr=log)
        self.processes.append(process)
        return process

    def python(self, name: str, module: str, *arguments: str, **more: str) -> subprocess.Popen[bytes]:
        return self.start(name, sys.executable, "-m", module, *arguments, **more)

    def start_coordinator(self, config: Path) -> None:
        self.coordinator = self.python(
            "coordinator",
            "fedtide.coordinator",
            str(config),
            FEDTIDE_COORDINATOR_NAME=f"{self.cloud}-coordinator-x",
            FEDTIDE_ADVERTISE_URL=f"https://127.0.0.1:{self.ports['api']}",
        )

    def fedtide(self, *arguments: str) -> str:
        """What a command prints; it must succeed."""
        command = [shutil.which("fedtide", path=Path(sys.executable).parent) or "fedtide", *arguments]
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, check=False, timeout=120)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def play_kubelet(self) -> None:
        """The pod of every Job, as a process; what becomes of it is written into the Job."""

        def run() -> None:
            until(lambda: bool(self.api_server.names("jobs")), "a Job", 60)
            (name,) = self.api_server.names("jobs")
            job = self.api_server.one("jobs", name)
            (container,) = job["spec"]["template"]["spec"]["containers"]
            secret = self.api_server.one("secrets", name)["data"]
            files = {k: base64.b64decode(v).decode() for k, v in secret.items()}
            files["config.json"] = files["config.json"].replace('"/work"', f'"{self.folder}/{name}/work"')
            self.mount(name, "etc/fedtide/run", files)
            self.mount(name, "etc/fedtide/tls", {"ca.crt": self.ca})
            (self.folder / name / "work").mkdir()
            argument = self.here(container["args"][0], name)
            code = self.python(name, "fedtide.aggregation", argument).wait()
            kind = "Complete" if code == 0 else "Failed"
            self.api_server.set_status("jobs", name, {"conditions": [{"type": kind, "status": "True"}]})

        threading.Thread(target=run, daemon=True).start()

    @property
    def ca(self) -> str:
        return (self.folder / "ca.crt").read_text()

    def stop(self) -> None:
        for process in reversed(self.processes):
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self.api_server.__exit__()


def included(secret: Mapping[str, str]) -> dict[str, str]:
    """What `nats.conf` includes of a Secret."""
    return {name: secret[name] for name in ("trust.conf", "at-rest.conf")}


@contextmanager
def machine(folder: Path, *names: str) -> Iterator[Machine]:
    there = Machine(folder, *names)
    try:
        yield there
    finally:
        there.stop()
    assert not there.quiet_log.exists(), there.quiet_log.read_text()


def config_maps(objects: list[dict[str, Any]]) -> dict[str, str]:
    return {n: t for b in objects if b["kind"] == "ConfigMap" for n, t in b["data"].items()}


def start_cloud(there: Machine) -> Client:
    own, servers = complete({}, {}, "default", ["localhost", "127.0.0.1", "ft-coordinator.fl.svc"], ["eu"])
    return start_installed_cloud(there, render(CLOUD, {"regions": ["eu"]}), own, servers)


def start_installed_cloud(
    there: Machine, objects: list[dict[str, Any]], own: dict[str, str], servers: dict[str, str]
) -> Client:
    """Hub and coordinator as pods of what Helm has installed, with their two Secrets."""
    files = config_maps(objects)
    (there.folder / "ca.crt").write_text(servers["ca.crt"])
    there.mount("hub", "etc/nats/config", {"nats.conf": files["nats.conf"], **included(servers)})
    there.mount("hub", "etc/nats/tls", servers)
    conf = there.folder / "hub/etc/nats/config/nats.conf"
    there.hub = there.start("hub", nats_server(), "-c", str(conf), POD_NAME=f"{there.cloud}-nats-0")
    there.own, there.servers = own, servers
    there.mount("cloud", "etc/fedtide/identity", own)
    there.mount("cloud", "etc/fedtide/tls", servers)
    config = there.mount("cloud", "etc/fedtide/config", {"coordinator.json": files["coordinator.json"]})
    there.start_coordinator(config / "coordinator.json")
    there.environment |= {
        "FEDTIDE_SERVER": f"https://127.0.0.1:{there.ports['api']}",
        "FEDTIDE_CA": str(there.folder / "ca.crt"),
        "FEDTIDE_TOKEN": own[API_TOKEN],
    }
    client = Client(Servers.find(there.environment), by="test")
    until(lambda: _answers(client), "the coordinator", 60)
    return client


def start_release_authority(there: Machine, objects: list[dict[str, Any]], secret: dict[str, str]) -> None:
    """Its pod, as Helm has installed it."""
    (pod,) = [
        body["spec"]["template"]["spec"]
        for body in objects
        if body["kind"] == "StatefulSet" and body["metadata"]["name"] == f"{there.cloud}-release-authority"
    ]
    (container,) = pod["containers"]
    there.mount("authority", "etc/fedtide/authority", secret)
    there.mount("authority", "etc/fedtide/tls", {"ca.crt": there.ca})
    there.mount("authority", "etc/fedtide/config", {"authority.json": config_maps(objects)["authority.json"]})
    command = [there.here(word, "authority") for word in container["command"]]
    there.start("authority", sys.executable, *command[1:])


def start_region(there: Machine, client: Client) -> None:
    made = client.send(endpoints.region_credentials("eu", [there.leaf_host, "127.0.0.1"]))
    values = {"region": "eu", "hub": {"url": "tls://hub.example.com:7422", "accounts": made.accounts}}
    there.edge_values = values
    objects = render(EDGE, {**values, "agent": {"config": {"heartbeat_s": 2, "open_inference": True}}})
    token = client.send(endpoints.create_join_token(TokenRequest(region="eu", uses=2))).token
    start_installed_region(there, client, objects, made.files, token)


def start_installed_region(
    there: Machine, client: Client, objects: list[dict[str, Any]], secret: dict[str, str], token: str
) -> None:
    """A leaf, the collector and two nodes as pods of what Helm has installed in a region."""
    files = config_maps(objects)
    there.mount("leaf", "etc/nats/config", {"nats.conf": files["nats.conf"], **included(secret)})
    there.mount("leaf", "etc/nats/region", secret)
    there.region = secret
    there.leaf = there.start("leaf", nats_server(), "-c", str(there.folder / "leaf/etc/nats/config/nats.conf"))
    config = there.mount("workers", "etc/fedtide/config", {"collector.json": files["collector.json"]})
    there.mount("workers", "etc/fedtide/region", secret)
    there.python("collector", "fedtide.edge_agent.drift.collector", str(config / "collector.json"))
    for number, node in enumerate(("node-1", "node-2")):
        own = {"FEDTIDE_NODE": node, "FEDTIDE_NODE_CONFIG": f'{{"partition-id": {number}, "num-partitions": 2}}'}
        there.mount(node, "etc/fedtide/region", {"ca.crt": secret["ca.crt"]})
        there.mount(node, "etc/fedtide/join", {"token": token})
        config = there.mount(node, "etc/fedtide/config", {"agent.json": files["agent.json"]})
        there.python(node, "fedtide.edge_agent", "--config", str(config / "agent.json"), **own)
    until(lambda: client.send(endpoints.status()).nodes.online == 2, "the nodes", 60)


def _ended(server: ApiServer) -> bool:
    return all("status" in server.one("jobs", name) for name in server.names("jobs"))


def _answers(client: Client) -> bool:
    try:
        return bool(client.send(endpoints.status()))
    except FedtideError:
        return False


@pytest.mark.slow
def test_what_the_charts_render_runs_a_round(tmp_path: Path) -> None:
    with machine(tmp_path) as there:
        client = start_cloud(there)
        start_region(there, client)
        there.play_kubelet()
        run = json.loads(there.fedtide("run", "start", "--app", str(APPS / "mean"), "-o", "json"))["run"]
        *_, last = client.stream(endpoints.watch_run(run), timeout_s=60)
        assert last.state == "completed", last
        until(lambda: _ended(there.api_server), "the end of the Job", 30)
        (name,) = there.api_server.names("jobs")
        there.api_server.remove("jobs", name)  # its time to live is over
        until(lambda: not there.api_server.names("secrets"), "the Secret of the run to be removed", 30)


@pytest.mark.slow
def test_a_server_uses_a_certificate_that_was_renewed(tmp_path: Path) -> None:
    with machine(tmp_path) as there:
        start_cloud(there)
        assert is_alive(there)
        before = serial(there)
        assert serial(there) == before and is_alive(there)
        _, servers = complete(there.own, {}, "default", ["localhost", "127.0.0.1"], ["eu"])
        there.mount("hub", "etc/nats/tls", {name: servers[name] for name in ("tls.crt", "tls.key")})
        assert is_alive(there)
        until(lambda: serial(there) != before, "the new certificate")
        there.hub.terminate()
        there.hub.wait()
        assert not is_alive(there)


@pytest.mark.slow
def test_a_rotation_under_load_loses_nothing_and_drops_no_request(tmp_path: Path) -> None:
    with machine(tmp_path) as there:
        client = start_cloud(there)
        start_region(there, client)
        there.play_kubelet()
        there.fedtide("try")
        there.fedtide("rollout", "start", "line", "--watch")
        until(lambda: _ended(there.api_server), "the end of the Job", 30)
        there.api_server.remove("jobs", *there.api_server.names("jobs"))
        assert is_alive(there)

        with asking(client.send(endpoints.node("node-1")).inference_url) as answers:
            there.play_kubelet()
            app = ["--app", str(APPS / "mean"), "--set", "num-server-rounds=15", "--set", "delay=0.5"]
            run = json.loads(there.fedtide("run", "start", *app, "-o", "json"))["run"]
            until(lambda: len(client.send(endpoints.run(run)).rounds) > 3, "some rounds", 60)
            before = serial(there)
            own, servers = complete(
                there.own, there.servers, "default", ["localhost", "127.0.0.1"], ["eu"], Wants(86400, renew=True)
            )
            there.mount("cloud", "etc/fedtide/identity", own)
            there.mount("cloud", "etc/fedtide/tls", servers)
            there.mount("hub", "etc/nats/tls", {name: servers[name] for name in ("tls.crt", "tls.key")})
            assert is_alive(there)
            until(lambda: serial(there) != before, "the new certificate")
            there.coordinator.terminate()
            assert there.coordinator.wait(30) == 0
            there.start_coordinator(there.folder / "cloud/etc/fedtide/config/coordinator.json")
            until(lambda: _answers(client), "the coordinator", 60)
            renew_region(there)
            # Now those of the beginning are void: the leaf's link is cut, and comes back with the new ones.
            client.send(endpoints.region_credentials("eu", []))
            *_, last = client.stream(endpoints.watch_run(run), timeout_s=90)
        assert last.state == "completed" and last.attempt == 1, last
        updates = [r.phases["train"].states.get("answered", 0) for r in last.rounds if r.round]
        assert updates == [2] * 15, "no update was lost"
        assert len(answers) > 100 and set(answers) == {200}, Counter(answers)


@contextmanager
def asking(url: str) -> Iterator[list[int]]:
    """Requests to a node's model, one after the other; what became of each."""
    body = json.dumps({"inputs": [{"name": "x", "shape": [1, 1], "datatype": "FP32", "data": [0.5]}]}).encode()
    answers: list[int] = []
    over = threading.Event()

    def ask() -> None:
        while not over.wait(0.02):
            request = urllib.request.Request(f"{url}/v2/models/line/infer", body, {"Content-Type": "application/json"})
            try:
                with urllib.request.urlopen(request, timeout=10) as answer:
                    answers.append(answer.status)
            except OSError as exc:
                answers.append(getattr(exc, "code", 0))

    asker = threading.Thread(target=ask)
    asker.start()
    try:
        yield answers
    finally:
        over.set()
        asker.join()


def renew_region(there: Machine) -> None:
    """As the edge chart's CronJob does it, but that the Secret is mounted again at once."""
    assert is_alive(there, "leaf")
    before = serial(there, "leaf_client")
    data = {name: base64.b64encode(text.encode()).decode() for name, text in prepared(there.region).items()}
    there.api_server.put(
        "secrets", {"metadata": {"name": "fedtide-region", "namespace": there.namespace}, "data": data}
    )
    objects = render(EDGE, {**there.edge_values, "rotation": {"schedule": "41 4 * * 0"}})
    (job,) = (b["spec"]["jobTemplate"]["spec"]["template"]["spec"] for b in objects if b["kind"] == "CronJob")
    (container,) = job["containers"]
    _, _, module = container["command"]
    arguments = [there.here(text, "leaf") for text in container["args"]]
    assert there.python("renewal", module, *arguments).wait(60) == 0, (there.folder / "renewal.log").read_text()
    found = there.api_server.one("secrets", "fedtide-region")["data"]
    there.region = {name: base64.b64decode(text).decode() for name, text in found.items() if text is not None}
    there.mount("leaf", "etc/nats/config", included(there.region))
    there.mount("leaf", "etc/nats/region", there.region)
    assert is_alive(there, "leaf")
    until(lambda: serial(there, "leaf_client") != before, "the leaf's new certificate")


def is_alive(there: Machine, pod: str = "hub") -> bool:
    """As the liveness probe of the hub, or of a region's leaf, finds out."""
    chart = render(CLOUD, {"regions": ["eu"]}) if pod == "hub" else render(EDGE, there.edge_values)
    script = config_maps(chart)["alive.sh"].replace("/tmp/seen", f"{there.folder}/seen-{pod}")
    monitor = f"http://127.0.0.1:{there.ports['monitor' if pod == 'hub' else 'leaf_monitor']}/healthz"
    command, process = ["sh", "-c", there.here(script, pod), "alive.sh", monitor], getattr(there, pod)
    return subprocess.run(command, env={**os.environ, "NATS_PID": str(process.pid)}, check=False).returncode == 0


def serial(there: Machine, port: str = "client") -> str:
    context = ssl.create_default_context(cadata=there.ca)
    with (
        socket.create_connection(("127.0.0.1", there.ports[port]), timeout=10) as plain,
        context.wrap_socket(plain, server_hostname="127.0.0.1") as secure,
    ):
        return str((secure.getpeercert() or {})["serialNumber"])
