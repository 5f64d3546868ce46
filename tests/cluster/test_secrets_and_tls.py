"""The Secrets of an installation, and everything that speaks TLS with what is in them: hub, API, standby, client."""

from __future__ import annotations

import asyncio
import base64
import io
import os
import ssl
import subprocess
import sys
import tarfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from aiohttp import web
from kubernetes import client

from fedtide.console import endpoints
from fedtide.console.client import ApiError, Client
from fedtide.console.embedded.plan import free_ports
from fedtide.console.servers import Servers
from fedtide.coordinator.adapters import identity_job
from fedtide.coordinator.adapters.identity_job import Installed, keep
from fedtide.coordinator.api.access import access_middleware
from fedtide.coordinator.api.http import NEEDED
from fedtide.coordinator.api.principals import Principals
from fedtide.coordinator.api.standby_proxy import StandbyProxy
from fedtide.coordinator.config import CoordinatorConfig
from fedtide.coordinator.identity.certificates import is_good
from fedtide.coordinator.identity.installation_secrets import API_TOKEN, CERT, KEY, Wants, complete, warnings
from fedtide.coordinator.identity.people import People
from fedtide.edge_agent.identity.cluster_node import describe
from fedtide.fabric.cluster.restarts import ANNOTATION, restart
from fedtide.fabric.errors import BrokerUnavailable, ConfigError
from fedtide.fabric.nats.authority import COORDINATOR, FILE, OPERATOR, SYSTEM_CREDENTIALS, TRUST
from fedtide.fabric.nats.backup_file import CONTENTS, Contents
from fedtide.fabric.nats.broker import Broker
from fedtide.fabric.nats.credentials import Access, Credentials
from fedtide.fabric.process.web_access import TokenFile
from tests.cluster.api_server import ApiServer, Object
from tests.conftest import NatsServer

HOSTS = ["localhost", "127.0.0.1"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """All secrets of an installation as files."""
    for files in complete({}, {}, "default", HOSTS, ["eu"]):
        for name, text in files.items():
            (tmp_path / name).write_text(text)
    return tmp_path


def test_secrets_are_made_once_and_certificates_anew_when_hosts_change() -> None:
    own, shared = complete({}, {}, "default", HOSTS, ["eu"])
    assert complete(own, shared, "default", HOSTS, ["eu"]) == (own, shared)
    more, anew = complete(own, shared, "default", [*HOSTS, "hub.example.com"], ["eu"])
    assert more == own
    assert complete(own, {}, "default", HOSTS, ["eu"])[1]["ca.crt"] == shared["ca.crt"]  # the other Secret was lost
    assert anew[CERT] != shared[CERT]
    assert is_good(anew[CERT], ["hub.example.com"])
    assert not is_good(shared[CERT], ["hub.example.com"])
    assert own[OPERATOR] not in shared[TRUST]


HOUR = Wants(lifetime_s=3600)


def test_a_rotation_makes_certificate_and_credentials_anew_and_keeps_the_authority() -> None:
    own, shared = complete({}, {}, "default", HOSTS, ["eu"])
    assert Credentials.parse(own[COORDINATOR]).lifetime_s is None, "without a rotation nothing ends by itself"
    later, anew = complete(own, shared, "default", HOSTS, ["eu"], replace(HOUR, renew=True))
    assert {name for name in own if own[name] != later[name]} == {COORDINATOR, SYSTEM_CREDENTIALS}
    assert {name for name in shared if shared[name] != anew[name]} == {CERT, KEY}
    held = Credentials.parse(later[COORDINATOR])
    assert held.lifetime_s == pytest.approx(3600, abs=2) and not warnings(held)
    assert complete(later, anew, "default", HOSTS, ["eu"], HOUR) == (later, anew), "an upgrade changes nothing"
    off, _ = complete(later, anew, "default", HOSTS, ["eu"])
    assert Credentials.parse(off[COORDINATOR]).lifetime_s is None, "nobody would renew them any more"


def test_credentials_end_from_the_first_install_with_a_rotation_on() -> None:
    own, _ = complete({}, {}, "default", HOSTS, ["eu"], HOUR)
    for name in (COORDINATOR, SYSTEM_CREDENTIALS):
        assert Credentials.parse(own[name]).lifetime_s == pytest.approx(3600, abs=2)


def test_a_rotation_makes_no_other_authority() -> None:
    own, shared = complete({}, {}, "default", HOSTS, ["eu"])
    del own["ca.key"]
    with pytest.raises(ConfigError, match="where their key is"):
        complete(own, shared, "default", HOSTS, ["eu"], replace(HOUR, renew=True))


def test_credentials_that_end_soon_are_named_and_renewed_by_an_upgrade(monkeypatch: pytest.MonkeyPatch) -> None:
    own, shared = complete({}, {}, "default", HOSTS, ["eu"], HOUR)
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 3000)
    assert "end on" in warnings(Credentials.parse(own[COORDINATOR]))[0]
    later, _ = complete(own, shared, "default", HOSTS, ["eu"], HOUR)
    assert Credentials.parse(later[COORDINATOR]).expires > now + 6000


def test_the_hook_restarts_what_it_is_told_to(tmp_path: Path) -> None:
    with ApiServer() as server:
        body: Object = {"metadata": {"name": "ft-coordinator", "namespace": "fl"}}
        server.put("deployments", {**body, "spec": {"selector": {}, "template": {"metadata": {}}}})
        api = client.ApiClient(client.Configuration(host=server.url))
        asked = ["deployment/ft-coordinator", "deployment/ft-operator"]
        assert restart(api, "fl", asked) == ["deployment/ft-coordinator"]
        assert ANNOTATION in server.one("deployments", "ft-coordinator")["spec"]["template"]["metadata"]["annotations"]
        with pytest.raises(ConfigError, match="cannot be restarted"):
            restart(api, "fl", ["pod/x"])


def test_the_hook_refuses_another_number_of_servers_and_changes_nothing() -> None:
    with ApiServer() as server:
        api = client.CoreV1Api(client.ApiClient(client.Configuration(host=server.url)))
        keep(api, Installed("fl", "ft", "default", HOSTS, ["eu"], 1))
        before = server.one("secrets", "ft-servers")["data"]
        assert keep(api, Installed("fl", "ft", "default", HOSTS, ["eu"], 1)) == []
        with pytest.raises(ConfigError, match=r"is 3 where 1 are installed.*second release.*hub-servers"):
            keep(api, Installed("fl", "ft", "default", [*HOSTS, "more"], ["eu"], 3))
        assert server.one("secrets", "ft-servers")["data"] == before
        assert keep(api, Installed("fl", "ft", "default", HOSTS, ["eu"], 1, storage="20Gi")) == ["ft-servers"]
        with pytest.raises(ConfigError, match=r"is 30Gi where 20Gi is installed.*fedtide k8s grow 30Gi"):
            keep(api, Installed("fl", "ft", "default", HOSTS, ["eu"], 1, storage="30Gi"))


def test_an_installation_without_an_identity_takes_that_of_a_backup(tmp_path: Path) -> None:
    lost, _ = complete({}, {}, "default", HOSTS, ["eu"])
    with tarfile.open(tmp_path / "fedtide-20260101T000000Z.tar", "w") as archive:
        contents = Contents(at="2026-01-01", tenant="default", regions=["eu"], epoch="", events=1, streams=[])
        kept = {f"identity/{name}": text for name, text in lost.items() if name != OPERATOR}
        for name, text in {**kept, CONTENTS: contents.model_dump_json()}.items():
            about = tarfile.TarInfo(name)
            about.size = len(text)
            archive.addfile(about, io.BytesIO(text.encode()))
    with ApiServer() as server:
        command = [sys.executable, "-m", identity_job.__name__, "--namespace", "fl", "--name", "ft"]
        command += ["--hosts", ",".join(HOSTS), "--regions", "eu", "--restore", f"file://{tmp_path}/"]
        for changed in ("ft-identity, ft-servers", "nothing"):
            done = subprocess.run(
                command,
                env={**os.environ, "KUBECONFIG": str(server.kubeconfig_in(tmp_path))},
                capture_output=True,
                text=True,
                check=False,
            )
            assert f"changed: {changed}" in done.stdout, done.stderr
        made = {k: base64.b64decode(v).decode() for k, v in server.one("secrets", "ft-identity")["data"].items()}
        assert {name: made[name] for name in (FILE, API_TOKEN)} == {name: lost[name] for name in (FILE, API_TOKEN)}


def test_the_hook_leaves_what_is_there_alone() -> None:
    with ApiServer() as server:
        api = client.CoreV1Api(client.ApiClient(client.Configuration(host=server.url)))
        made = ["ft-identity", "ft-servers", "ft-release-authority", "ft-trust-offline"]
        assert keep(api, Installed("fl", "ft", "default", HOSTS, ["eu"])) == made
        held = {name: set(server.one("secrets", name)["data"]) for name in made}
        assert "root.pem" not in held["ft-identity"] | held["ft-release-authority"] | held["ft-servers"]
        assert "releases.pem" not in held["ft-identity"]
        assert "director.pem" not in held["ft-release-authority"]
        assert {"signer.creds", "releases.pem", "trust-roots.json"} <= held["ft-release-authority"]
        before = {name: server.one("secrets", name)["data"] for name in server.names("secrets")}
        assert keep(api, Installed("fl", "ft", "default", HOSTS, ["eu"])) == []
        assert keep(api, Installed("fl", "ft", "default", [*HOSTS, "hub"], ["eu"])) == ["ft-servers"]
        assert server.one("secrets", "ft-identity")["data"] == before["ft-identity"]


async def test_a_hub_with_tls_lets_in_whoever_trusts_it_and_has_credentials(folder: Path) -> None:
    (port,) = free_ports(1)
    config = folder / "hub.conf"
    config.write_text(
        f"""listen: 127.0.0.1:{port}
include "{TRUST}"
resolver: {{ type: full, dir: "{folder}/accounts" }}
tls {{ cert_file: "{folder}/tls.crt", key_file: "{folder}/tls.key", handshake_first: true }}
"""
    )
    server = NatsServer(config, port)
    server.start()
    url = f"tls://127.0.0.1:{port}"
    try:
        broker = await Broker.connect(url, "test", Access(folder / COORDINATOR, folder / "ca.crt"))
        await broker.close()
        with pytest.raises(BrokerUnavailable):
            await Broker.connect(url, "test", Access(folder / COORDINATOR), wait_s=1)  # does not know its authority
    finally:
        server.kill()


@asynccontextmanager
async def serving(app: web.Application, folder: Path) -> AsyncIterator[str]:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(folder / "tls.crt", folder / "tls.key")
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0, ssl_context=context)
    await site.start()
    try:
        yield f"https://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


async def test_a_standby_passes_callers_on_with_their_token(folder: Path) -> None:
    fields = {"nats_url": "tls://hub:4222", "regions": ["eu"], "http_token_file": folder / API_TOKEN}
    CoordinatorConfig.model_validate({**fields, "http_host": "0.0.0.0"})
    principals = Principals(TokenFile(folder / API_TOKEN), People, None)
    leader = web.Application(middlewares=access_middleware(principals, "0.0.0.0"))
    leader[NEEDED] = {}

    async def echo(request: web.Request) -> web.Response:
        path, by = request.path_qs, request.headers["Fedtide-By"]
        return web.json_response({"id": path, "rules": {(await request.read()).decode(): by and "fired"}})

    leader.router.add_route("*", "/{path:.*}", echo)
    proxy = StandbyProxy(folder / "ca.crt", "localhost")
    async with serving(leader, folder) as url:
        standby = web.Application()

        async def pass_on(request: web.Request) -> web.StreamResponse:
            return await proxy.pass_on(url, request)

        standby.router.add_route("*", "/{path:.*}", pass_on)
        async with serving(standby, folder) as other:
            call = endpoints.send_event(b"{}")
            with pytest.raises(ConfigError, match="Set FEDTIDE_CA"):
                await asyncio.to_thread(Client(Servers((other,))).send, call)
            with pytest.raises(ApiError, match="Set FEDTIDE_TOKEN"):
                await asyncio.to_thread(Client(Servers((other,), "", folder / "ca.crt")).send, call)
            known = Servers((other,), (folder / API_TOKEN).read_text(), folder / "ca.crt")
            answer = await asyncio.to_thread(Client(known).send, call)
            assert (answer.id, answer.rules) == ("/v1/events", {"{}": "fired"})
    await proxy.close()


@pytest.mark.parametrize(
    ("labels", "cordoned", "wanted"),
    [
        ({}, False, {"spot": "false"}),
        (
            {"topology.kubernetes.io/zone": "a", "cloud.google.com/gke-spot": "true"},
            True,
            {"zone": "a", "spot": "true"},
        ),
        (
            {"node.kubernetes.io/instance-type": "g5.xlarge", "eks.amazonaws.com/capacityType": "ON_DEMAND"},
            False,
            {"instance-type": "g5.xlarge", "spot": "false"},
        ),
    ],
)
def test_labels_of_the_cluster_become_labels_of_the_node(labels: Object, cordoned: bool, wanted: Object) -> None:
    node = describe({"metadata": {"labels": labels}, "spec": {"unschedulable": cordoned} if cordoned else {}})
    assert (node.labels, node.schedulable) == (wanted, not cordoned)
