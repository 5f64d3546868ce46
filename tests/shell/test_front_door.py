"""The API's port: a certificate that was renewed is used for connections to come."""

from __future__ import annotations

import asyncio
import ssl
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from fedtide.coordinator.api import front_door
from fedtide.coordinator.api.front_door import FrontDoor
from fedtide.coordinator.config import CoordinatorConfig
from fedtide.coordinator.identity import certificates


async def serial(url: str, ca: str) -> str:
    context = ssl.create_default_context(cadata=ca)
    _, writer = await asyncio.open_connection("127.0.0.1", urlsplit(url).port, ssl=context, server_hostname="127.0.0.1")
    shown = writer.get_extra_info("peercert")["serialNumber"]
    writer.close()
    return str(shown)


async def test_a_renewed_certificate_is_used_and_a_half_written_one_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(front_door, "LOOK_EVERY_S", 0.01)
    ca, ca_key = certificates.authority("x")
    cert, key = tmp_path / "tls.crt", tmp_path / "tls.key"

    def renew() -> None:
        made = certificates.server(ca, ca_key, ["127.0.0.1"])
        for file, text in zip((key, cert), reversed(made), strict=True):
            file.write_text(text)

    renew()
    config = {"nats_url": "nats://127.0.0.1:1", "regions": [], "http_cert": cert, "http_key": key}
    door = FrontDoor(CoordinatorConfig.model_validate(config))
    url = await door.open()
    keeping = asyncio.create_task(door.keep_certificate())
    await asyncio.sleep(0)  # it has seen what is there
    before = await serial(url, ca)
    cert.write_text("half a certificate")
    await asyncio.sleep(0.05)  # time enough for what must not happen
    assert await serial(url, ca) == before
    renew()
    async with asyncio.timeout(20):
        while await serial(url, ca) == before:  # noqa: ASYNC110 - nothing tells
            await asyncio.sleep(0.01)
    keeping.cancel()
    await door.close()
