"""Somebody fills every stream that they can: what ends or undoes something still works, and room comes back."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from contextlib import suppress

import httpx
import pytest

from fedtide.console import endpoints
from fedtide.fabric.encoding import to_json
from fedtide.fabric.errors import FedtideError, StoreFull
from fedtide.fabric.events.envelope import Event
from fedtide.fabric.nats.broker import Broker
from fedtide.fabric.nats.credentials import Access
from fedtide.fabric.nats.subjects import Subjects
from tests.conftest import APPS
from tests.integration.conftest import bring_up
from tests.integration.installation import Installation, until
from tests.integration.releases import release
from tests.scenarios.build import joined

pytestmark = pytest.mark.slow
SUBJECTS = Subjects()


@pytest.fixture
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Installation]:
    there = bring_up(tmp_path_factory.mktemp("small"), "eu", 3, "--room", "80MB")
    yield there
    there.run("down")


async def fill(there: Installation, node: str) -> None:
    """What a node may store, it stores."""
    access = Access(there.home / "nodes" / node / "identity.creds")
    broker = await Broker.connect(there.leaf("eu"), "evil", access)
    prefix = SUBJECTS.update_blob("eu", node, "no-run", "d" * 64)
    labels, number = {f"label-{i}": "x" * 100 for i in range(1_500)}, 0
    try:
        with suppress(StoreFull):  # the log has less room than this
            for i in range(100):
                report = to_json(Event.now("evil", joined(node, labels=labels), id=f"evil-{i}"))
                await broker.publish(SUBJECTS.report("eu", node, "node-joined"), report, message_id=f"evil-{i}")
        with suppress(StoreFull):
            for number in range(200):
                await broker.publish(f"{prefix}.{number}", os.urandom(1_000_000))
        assert number < 199, "there is no end to the room"
    finally:
        await broker.close()


def fill_with_bundles(there: Installation) -> httpx.Response:
    with httpx.Client(base_url=there.state["apis"][0], headers=there.shown, timeout=30) as client:
        for _ in range(100):
            answer = client.put("/v1/bundles", content=os.urandom(1_000_000))
            if answer.status_code != 200:
                return answer
    raise AssertionError("there is no end to the room")


def test_a_full_hub_still_cancels_revokes_and_rolls_back(small: Installation) -> None:
    release(small, 1.0)
    first = small.json("rollout", "start", "scale", "--bake", "0")["rollout"]
    until(lambda: small.rollout(first).state == "completed", "the first roll-out")
    release(small, 2.0)
    second = small.json("rollout", "start", "scale", "--bake", "0")["rollout"]
    until(lambda: small.rollout(second).state == "completed", "the second roll-out")
    run = small.json("run", "start", "--app", str(APPS / "mean"), "--rounds", "50", "--set", "delay=1")["run"]
    until(lambda: bool(small.show(run).rounds[1:]), "the first round")

    refused = fill_with_bundles(small)
    assert refused.status_code == 507 and "store is full" in refused.json()["detail"]
    asyncio.run(fill(small, "eu-2"))
    until(lambda: bool(small.json("status")["warnings"]), "the warning", 30)
    shown = small.json("storage")
    assert {(s["region"], s["stream"]) for s in shown if s["size_bytes"] > 0.8 * s["max_bytes"]} >= {("hub", "DOWN")}

    for command in (
        ("run", "cancel", run),
        ("rollout", "rollback", second),
        ("fleet", "revoke", "eu-2", "--reason", "it fills its region"),
        ("fleet", "token", "create", "--region", "eu"),
    ):
        done = small.process(*command, timeout_s=30)
        assert done.returncode == 0, (command, done.stderr)
    assert small.finish(run).state == "cancelled"
    until(lambda: small.rollout(second).state == "rolledback", "the roll-back", 60)
    before = small.model("scale").releases[0].digest
    until(lambda: small.node("eu-1").serving.get("scale") == before, "the release before, on the node", 60)

    until(lambda: not [s for s in small.json("storage") if s["stream"].startswith("UP") and _is_full(s)], "room", 150)
    with pytest.raises(FedtideError, match="store is full"):
        small.client.send(endpoints.put_bundle(os.urandom(1_000_000)))
    gone = small.json("gc", "--unused-for", "0s")
    assert {g["stream"] for g in gone if "no run, release or rule" in g["reason"]} == {"DOWN"}
    assert small.train(APPS / "mean", "--rounds", "1").state == "completed"
    assert small.json("status")["warnings"] == []


def _is_full(stream: dict[str, int]) -> bool:
    return stream["size_bytes"] > 0.5 * stream["max_bytes"]
