"""A log that is lost or put back is noticed; a backup brings it back."""

from __future__ import annotations

import asyncio
import os
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from fedtide.coordinator import backup
from fedtide.coordinator.config import CoordinatorConfig
from fedtide.coordinator.log.engine import Engine
from fedtide.coordinator.log.event_log import EventLog
from fedtide.coordinator.log.log_marks import FileMarks
from fedtide.coordinator.log.snapshots import Snapshots
from fedtide.coordinator.service import serve
from fedtide.coordinator.state import World
from fedtide.fabric.errors import ConfigError, DigestMismatch, LogLost
from fedtide.fabric.events.envelope import EventData
from fedtide.fabric.events.runs import RunCancelRequested
from fedtide.fabric.nats.broker import Broker
from fedtide.fabric.nats.subjects import CONTROL, EVENTS, Subjects
from fedtide.fabric.nats.transfer import put_blob
from tests.conftest import NatsServer
from tests.scenarios.build import joined, requested

SUBJECTS = Subjects()


@pytest.fixture
def config(hub: NatsServer, tmp_path: Path) -> CoordinatorConfig:
    return CoordinatorConfig(
        nats_url=hub.url,
        regions=[],
        data_dir=tmp_path / "coordinator",
        endpoint_file=tmp_path / "api.json",
        warm_aggregator=False,
    )


@asynccontextmanager
async def coordinator(config: CoordinatorConfig) -> AsyncIterator[None]:
    """A real one, until the block ends."""
    assert config.endpoint_file is not None
    config.endpoint_file.unlink(missing_ok=True)
    serving = asyncio.create_task(serve(config))
    async with asyncio.timeout(30):
        while not config.endpoint_file.exists() and not serving.done():  # noqa: ASYNC110
            await asyncio.sleep(0.05)
    if serving.done():
        await serving
    try:
        yield
    finally:
        serving.cancel()
        with pytest.raises(asyncio.CancelledError):
            await serving


async def world(config: CoordinatorConfig, *more: EventData) -> World:
    """What the log says; `more` is logged first, while no coordinator runs."""
    broker = await Broker.connect(config.nats_url, "test")
    engine = Engine(broker, SUBJECTS, EventLog(broker, SUBJECTS), Snapshots(broker, SUBJECTS))
    await engine.load()
    await engine.catch_up()
    for data in more:
        await engine.take_over(data)
    await broker.close()
    return engine.world


async def streams_of(url: str) -> bool:
    broker = await Broker.connect(url, "test")
    try:
        return await broker.has_stream(EVENTS)
    finally:
        await broker.close()


async def test_a_hub_that_lost_its_store_is_not_taken_for_a_new_one(
    hub: NatsServer, config: CoordinatorConfig, tmp_path: Path
) -> None:
    async with coordinator(config):
        pass
    mark = await FileMarks(config.data_dir).read()
    assert mark is not None and mark.epoch == (await world(config)).epoch.id and mark.sequence >= 1
    hub.kill()
    shutil.rmtree(tmp_path / "store")
    hub.start()
    with pytest.raises(LogLost, match=r"no event log, but this installation has one.*delete the file"):
        await serve(config)
    assert not await streams_of(hub.url), "nothing was created that would hide it"
    (config.data_dir / "log.json").unlink()
    async with coordinator(config):
        assert (await world(config)).epoch.generation == 0, "begun anew, because somebody said so"


async def test_a_store_that_was_put_back_is_another_log_for_nodes(
    hub: NatsServer, config: CoordinatorConfig, tmp_path: Path
) -> None:
    async with coordinator(config):
        pass
    hub.kill()
    shutil.copytree(tmp_path / "store", tmp_path / "kept")
    hub.start()
    async with coordinator(config):
        pass
    before = await world(config, joined("n1"))
    async with coordinator(config):
        assert (await world(config)).epoch == before.epoch, "the same log goes on"
    hub.kill()
    shutil.rmtree(tmp_path / "store")
    (tmp_path / "kept").rename(tmp_path / "store")
    hub.start()
    async with coordinator(config):
        after = await world(config)
    assert after.epoch.generation == 1 and after.epoch.id != before.epoch.id and after.nodes == {}


@pytest.mark.slow
async def test_a_backup_of_a_running_installation_brings_it_back(
    hub: NatsServer, config: CoordinatorConfig, tmp_path: Path
) -> None:
    file = tmp_path / "backup.tar"
    async with coordinator(config):
        pass
    await world(config, joined("n1"), requested(), RunCancelRequested(run="run-1"))
    broker = await Broker.connect(hub.url, "test")
    app = await put_blob(broker, SUBJECTS.blob, "DOWN", [os.urandom(3_000_000)], ttl_s=None)
    await broker.close()
    async with coordinator(config):
        saved = await backup.save(config, file)
        with pytest.raises(ConfigError, match="runs"):
            await backup.restore(config, file, replace=True)
    assert file.stat().st_mode & 0o077 == 0
    later = await world(config, joined("n2"))
    with pytest.raises(ConfigError, match="holds a log already"):
        await backup.restore(config, file, replace=False)

    hub.kill()
    shutil.rmtree(tmp_path / "store")
    hub.start()
    assert (await backup.restore(config, file, replace=False)) == saved
    async with coordinator(config):
        after = await world(config)
        assert set(after.nodes) == {"n1"} and set(after.runs) == {"run-1"} and set(later.nodes) == {"n1", "n2"}
        assert after.epoch.generation == 1 and after.epoch.id not in ("", saved.epoch)
        broker = await Broker.connect(hub.url, "test")
        assert await broker.last("DOWN", f"{SUBJECTS.blob(app.digest)}.0") is not None
        assert await broker.last(CONTROL, SUBJECTS.lease) is not None
        await broker.close()
    async with coordinator(config):
        assert (await world(config)).epoch == after.epoch, "it is put back once"


async def test_a_damaged_backup_is_refused_before_anything_is_touched(
    hub: NatsServer, config: CoordinatorConfig, tmp_path: Path
) -> None:
    file = tmp_path / "backup.tar"
    async with coordinator(config):
        await backup.save(config, file)
    data = bytearray(file.read_bytes())
    at = data.index(b"S2sTwO") + 40
    data[at] ^= 1
    file.write_bytes(data)
    before = await world(config)
    with pytest.raises(DigestMismatch):
        await backup.restore(config, file, replace=True)
    assert (await world(config)).epoch == before.epoch
    file.write_bytes(b"x" * 1000)
    with pytest.raises(ConfigError, match="no backup"):
        await backup.restore(config, file, replace=True)
