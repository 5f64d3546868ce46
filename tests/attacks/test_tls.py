"""TLS that whoever sits in the path cannot talk anybody out of, and addresses without it."""

from __future__ import annotations

import asyncio
import json
import socket
import ssl
from pathlib import Path

import pytest
from pydantic import ValidationError

from fedtide.console.embedded.plan import free_ports
from fedtide.coordinator.config import CoordinatorConfig
from fedtide.coordinator.identity import certificates
from fedtide.edge_agent.config import AgentConfig
from fedtide.fabric.errors import BrokerUnavailable, ConfigError
from fedtide.fabric.nats.accounts import CORE
from fedtide.fabric.nats.authority import Authority
from fedtide.fabric.nats.broker import Broker
from fedtide.fabric.nats.credentials import Access
from fedtide.fabric.nats.urls import check_url
from tests.conftest import NatsServer
from tests.integration.installation import until

INFO = {"server_id": "X", "version": "2.15.1", "headers": True, "max_payload": 1 << 20, "auth_required": True}


async def test_nothing_is_said_to_a_server_that_begins_without_tls(tmp_path: Path) -> None:
    heard: list[bytes] = []

    async def in_the_path(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"INFO " + json.dumps({**INFO, "nonce": "abcdefghijk"}).encode() + b"\r\n")
        while piece := await reader.read(4096):
            heard.append(piece)
        writer.close()

    server = await asyncio.start_server(in_the_path, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    (tmp_path / "ca.crt").write_text(certificates.authority("x")[0])
    Authority.create("default")[0].credentials(CORE, "coordinator", "c").save(tmp_path / "c.creds")
    access = Access(tmp_path / "c.creds", tmp_path / "ca.crt")
    with pytest.raises(BrokerUnavailable):
        await Broker.connect(f"tls://127.0.0.1:{port}", "coordinator", access, wait_s=2)
    server.close()
    said = b"".join(heard)
    assert said[:1] == b"\x16", "the first byte is that of a TLS handshake"
    assert b"CONNECT" not in said and b"jwt" not in said


@pytest.mark.parametrize("url", ["nats://hub.example.com:4222", "nats://10.0.0.1:4222", "ws://127.0.0.1:1", "hub", ""])
def test_an_address_without_tls_is_for_this_machine_only(url: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"unencrypted|no address"):
        check_url("nats_url", url)
    with pytest.raises(ValidationError, match=r"unencrypted|no address"):
        CoordinatorConfig.model_validate({"nats_url": url, "regions": ["eu"]})
    with pytest.raises(ValidationError, match=r"unencrypted|no address"):
        AgentConfig.model_validate({"node": "n", "region": "eu", "nats_url": url, "data_dir": tmp_path})


@pytest.mark.parametrize(
    "url", ["tls://hub.example.com:4222", "nats://127.0.0.1:4222", "nats://localhost:1", "nats://[::1]:1"]
)
def test_others_are_taken(url: str) -> None:
    assert check_url("nats_url", url) == url


def test_the_certificate_of_a_region_makes_nobody_a_server_of_the_hub(tmp_path: Path) -> None:
    """Routes carry every account: who is let in there is the hub."""
    ca, ca_key = certificates.authority("x")
    (tmp_path / "ca.crt").write_text(ca)
    made = {
        "hub": certificates.server(ca, ca_key, ["127.0.0.1"], connects=True),
        "region": certificates.server(ca, ca_key, ["127.0.0.1"]),
    }
    for name, (cert, key) in made.items():
        (tmp_path / f"{name}.crt").write_text(cert)
        (tmp_path / f"{name}.key").write_text(key)
    port, route = free_ports(2)
    of_hub = f'cert_file: "{tmp_path}/hub.crt", key_file: "{tmp_path}/hub.key", ca_file: "{tmp_path}/ca.crt"'
    (tmp_path / "hub.conf").write_text(
        f"listen: 127.0.0.1:{port}\n"
        f"cluster {{ name: x, listen: 127.0.0.1:{route}, tls {{ {of_hub}, verify: true }} }}\n"
    )
    server = NatsServer(tmp_path / "hub.conf", port)
    server.start()
    try:
        until(lambda: is_open(route), "the port for routes")
        assert answers_as_route(route, tmp_path, "hub")
        assert not answers_as_route(route, tmp_path, "region")
    finally:
        server.kill()


def is_open(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def answers_as_route(port: int, folder: Path, who: str) -> bool:
    context = ssl.create_default_context(cafile=str(folder / "ca.crt"))
    context.load_cert_chain(folder / f"{who}.crt", folder / f"{who}.key")
    with socket.create_connection(("127.0.0.1", port), timeout=10) as plain:
        try:
            with context.wrap_socket(plain, server_hostname="127.0.0.1") as secure:
                return secure.recv(5) == b"INFO "
        except OSError:
            return False
