"""What shell tests share: a server in memory with all streams of the hub, and connections to it."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from fedtide.fabric.nats.streams import hub_streams, region_stream
from fedtide.fabric.nats.subjects import Subjects
from tests.shell.fake_broker import FakeBroker, FakeNats

SUBJECTS = Subjects()


@pytest.fixture
async def nats() -> FakeNats:
    return await started_nats()


async def started_nats() -> FakeNats:
    """A server with the hub's streams."""
    server = FakeNats()
    setup = server.connect()
    for config in [*hub_streams(SUBJECTS), *(region_stream(SUBJECTS, r, sourced=True) for r in ("eu", "us"))]:
        await setup.ensure_stream(config)
    return server


@pytest.fixture
async def broker(nats: FakeNats) -> AsyncIterator[FakeBroker]:
    connection = nats.connect()
    yield connection
    await connection.close()
