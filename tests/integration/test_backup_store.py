"""Backups in an object store: a real S3 protocol, over HTTP."""

from __future__ import annotations

import asyncio
import shutil
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import boto3
import pytest
from moto.server import ThreadedMotoServer

from fedtide.coordinator.config import CoordinatorConfig
from fedtide.fabric.errors import ConfigError, NotFound, TransientError
from fedtide.fabric.nats.backup_store import BackupStore
from tests.conftest import NatsServer
from tests.integration.test_log_lost import config, coordinator

__all__ = ["config"]

CREDENTIALS = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    server = ThreadedMotoServer(port=0)
    server.start()
    host, port = server.get_host_and_port()
    for name, value in {**CREDENTIALS, "AWS_ENDPOINT_URL": f"http://{host}:{port}", "AWS_ALLOW_HTTP": "true"}.items():
        monkeypatch.setenv(name, value)
    boto3.client("s3").create_bucket(Bucket="backups")
    yield "s3://backups/one/"
    urllib.request.urlopen(urllib.request.Request(f"http://{host}:{port}/moto-api/reset", method="POST")).close()
    server.stop()


def _keys() -> list[str]:
    found = boto3.client("s3").list_objects_v2(Bucket="backups")
    return sorted(each["Key"] for each in found.get("Contents", []))


def test_the_newest_backups_are_kept_and_the_newest_is_fetched(bucket: str, tmp_path: Path) -> None:
    file = tmp_path / "file"
    s3 = boto3.client("s3")
    for old in ("fedtide-20250101T000000Z.tar", "fedtide-20250102T000000Z.tar", "notes.txt"):
        s3.put_object(Bucket="backups", Key=f"one/{old}", Body=b"old")
    file.write_bytes(b"x" * 20_000_000)  # in parts
    stored = BackupStore(bucket).put(file, keep=2)
    assert stored.startswith("s3://backups/one/fedtide-2")
    assert _keys() == [
        "one/fedtide-20250102T000000Z.tar",
        f"one/{stored.rpartition('/')[2]}",
        "one/notes.txt",
    ]
    back = tmp_path / "back"
    assert BackupStore(bucket).fetch(back) == stored and back.read_bytes() == file.read_bytes()
    assert BackupStore("s3://backups/one/fedtide-20250102T000000Z.tar").fetch(back) and back.read_bytes() == b"old"


def test_what_is_wrong_with_a_store_is_said(bucket: str, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"x")
    with pytest.raises(NotFound, match="no backup"):
        BackupStore(bucket).fetch(tmp_path / "back")
    with pytest.raises(NotFound, match="no backup"):
        BackupStore(f"{bucket}fedtide-1.tar").fetch(tmp_path / "back")
    with pytest.raises((TransientError, NotFound), match="s3://nowhere/"):
        BackupStore("s3://nowhere/").put(file)
    with pytest.raises(ConfigError, match="names no store"):
        BackupStore("gopher://x/y/").put(file)


@pytest.mark.slow
async def test_a_hub_is_copied_into_a_store_and_put_back_once(
    bucket: str, hub: NatsServer, config: CoordinatorConfig, tmp_path: Path
) -> None:
    file = tmp_path / "coordinator.json"
    file.write_text(config.model_dump_json(exclude_defaults=True))

    async def run(verb: str, *arguments: str) -> str:
        command = [sys.executable, "-m", "fedtide.coordinator.backup", verb, str(file), bucket, *arguments]
        done = await asyncio.to_thread(subprocess.run, command, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stderr
        return str(done.stdout)

    async with coordinator(config):
        assert "2 events" in await run("save", "--keep", "3") and len(_keys()) == 1
    assert "nothing to do" in await run("restore", "--if-empty")
    hub.kill()
    shutil.rmtree(tmp_path / "store")
    hub.start()
    waiting = asyncio.create_task(run("await"))
    assert "2 events" in await run("restore", "--if-empty")
    await waiting
    assert "nothing to do" in await run("restore", "--if-empty")
    assert not list(config.data_dir.glob("tmp*")), "nothing is left on the way"
