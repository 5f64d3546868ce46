"""Everything of a hub is lost, and comes back from a backup: an installation that is encrypted at rest."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedtide.console.home import Home
from tests.integration.conftest import bring_up
from tests.integration.installation import Installation, until
from tests.integration.releases import release

pytestmark = pytest.mark.slow
ROLLOUT = ("--canary", "0.5", "--bake", "0")


@pytest.fixture
def key(tmp_path: Path) -> Path:
    file = tmp_path / "key"
    file.write_text(secrets.token_hex(32))
    file.chmod(0o600)
    return file


@pytest.fixture
def there(tmp_path: Path, key: Path) -> Iterator[Installation]:
    installation = bring_up(tmp_path / "home", "eu", 3, "--at-rest-key", str(key), "--agent-set", "reconcile_s=1")
    yield installation
    installation.run("down")


def versions(there: Installation) -> set[str]:
    return {n.serving.get("scale", "")[:8] for n in there.nodes() if n.state == "online"}


def test_what_was_decided_holds_and_the_nodes_come_back(there: Installation, key: Path, tmp_path: Path) -> None:
    release(there, 1.0)
    first = there.json("rollout", "start", "scale", *ROLLOUT)["rollout"]
    until(lambda: there.rollout(first).state == "completed", "the first roll-out")
    assert there.run("fleet", "revoke", "eu-3", "--reason", "stolen").returncode == 0
    release(there, 2.0)
    waiting = there.json("rollout", "start", "scale", *ROLLOUT, "--set", "approve=[eu]")["rollout"]
    file = tmp_path / "backup.tar"
    saved = there.process("backup", str(file))
    assert saved.returncode == 0, saved.stderr
    assert b"PRIVATE" not in b"".join(f.read_bytes() for f in (there.home / "nats").rglob("*.blk"))
    models, before = there.model("scale"), versions(there)
    assert len(before) == 1

    # What comes after the backup is lost, but the nodes have seen it: their counters are higher than the log's.
    release(there, 3.0)
    late = there.json("rollout", "start", "scale", *ROLLOUT)["rollout"]
    until(lambda: there.rollout(late).state == "completed", "the last roll-out")

    os.kill(there.state["pid"], signal.SIGKILL)
    until(lambda: not (Path("/proc") / str(there.state["pid"])).exists(), "the end of everything")
    for folder in ("nats/hub", "nats/hub-accounts"):
        shutil.rmtree(there.home / folder)
    refused = there.process("up", "-d", "--regions", "eu", "--nodes-per-region", "3", "--at-rest-key", str(key))
    assert refused.returncode != 0 and "has no event log" in refused.stderr, refused.stderr

    restored = there.process("restore", str(file), "--at-rest-key", str(key))
    assert restored.returncode == 0, restored.stderr
    up = there.process(
        "up", "-d", "--regions", "eu", "--nodes-per-region", "3", "--at-rest-key", str(key),
        "--agent-set", "reconcile_s=1", timeout_s=200,
    )  # fmt: skip
    assert up.returncode == 0, up.stderr
    assert there.model("scale") == models
    # `fedtide up` gives each node a new join token, with which one that was revoked comes in again.
    assert [e.data["node"] for e in there.events(kind="identity.node_revoked")] == ["eu-3"]
    until(lambda: versions(there) == before, "what the log says that nodes serve")
    assert there.rollout(waiting).state not in ("completed", "failed")
    done = there.json("rollout", "start", "scale", *ROLLOUT)["rollout"]
    until(lambda: there.rollout(done).state == "completed", "a roll-out after all that", 120)
    until(lambda: not versions(there) & before, "the newest release on every node")
    assert Home(there.home).api_token_file.exists()
