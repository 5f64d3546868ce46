"""TLS that whoever sits in the path cannot talk anybody out of, and addresses without it."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest
from pydantic import ValidationError

from fedtide.coordinator.config import CoordinatorConfig
from fedtide.coordinator.identity import certificates
from fedtide.edge_agent.config import AgentConfig
from fedtide.fabric.errors import BrokerUnavailable, ConfigError
from fedtide.fabric.nats.accounts import CORE
from fedtide.fabric.nats.authority import Authority
from fedtide.fabric.nats.broker import Broker
from fedtide.fabric.nats.credentials import Access
from fedtide.fabric.nats.urls import check_url

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
