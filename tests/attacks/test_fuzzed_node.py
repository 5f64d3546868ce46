"""A node with good credentials that sends whatever it likes, while others train: their model is the same to the byte.

`FUZZ_S=600 pytest -m slow tests/attacks/test_fuzzed_node.py` does it for ten minutes.
"""

from __future__ import annotations

import asyncio
import os
import random
import time
from pathlib import Path
from urllib.parse import urlsplit

import psutil
import pytest

from fedtide.edge_agent.identity.enrolment import Enrolment
from fedtide.edge_agent.identity.node_trust import trust_store
from fedtide.fabric.encoding import to_json
from fedtide.fabric.events.envelope import Event
from fedtide.fabric.nats.accounts import NODES
from fedtide.fabric.nats.credentials import Credentials
from fedtide.fabric.nats.permissions import NODE
from fedtide.fabric.nats.subjects import Subjects
from tests.attacks.ground import HEADERS, REPLIES, Attacker, Role
from tests.conftest import APPS
from tests.hostile import hurt
from tests.integration.installation import Installation
from tests.scenarios.build import joined, measured, phase
from tests.served import config as agent_config

FUZZ_S = float(os.environ.get("FUZZ_S", "30"))
SEED = 17
A_SECOND = 1_500
"""Messages: more would measure how much two cores bear, not what comes of them."""
KINDS = ("rpt.node-joined", "rpt.rollout-node_phase", "rpt.run-completed", "reply.run-1.t", "reply.x.y.z", "blob.r.d.0")
MEGABYTES = 400
"""By how much the coordinator may grow: it holds what it is about to park."""


class Fuzzer:
    def __init__(self, port: int, credentials: Credentials, node: str) -> None:
        self._port, self._credentials = port, credentials
        self._role = Role(NODE, NODES, node, "eu", "eu")
        self._rng = random.Random(SEED)
        events = (joined(node), joined("eu-1"), phase(node, "confirmed"), measured(node))
        self._bodies = [to_json(Event.now("evil", each, id=f"evil-{n}")) for n, each in enumerate(events)]
        self.fired = 0

    def _subject(self) -> str:
        rng, root = self._rng, Subjects().root
        if rng.random() < 0.6:
            return f"{root}.up.eu.{self._role.user}.{rng.choice(KINDS)}"
        pattern = self._role.spelled(rng.choice(self._role.allowed().publish))
        return pattern.replace("*", rng.choice(("x", "eu-1", "*"))).replace(">", rng.choice(("x", "a.b.c", ">")))

    async def run(self, until: asyncio.Event) -> None:
        attacker, rng = await Attacker.at(self._port, self._credentials), self._rng
        while not until.is_set():
            began = time.monotonic()
            for _ in range(A_SECOND // 10):
                body = (
                    hurt(rng.choice(self._bodies), rng) if rng.random() < 0.8 else rng.randbytes(rng.randrange(2_000))
                )
                reply = rng.choice(REPLIES) if rng.random() < 0.3 else ""
                attacker.fire(self._subject(), body, reply, rng.choice(HEADERS) if rng.random() < 0.2 else {})
                self.fired += 1
            if not await attacker.flush():
                attacker.close()
                attacker = await Attacker.at(self._port, self._credentials)
            await asyncio.sleep(max(0.0, 0.1 - (time.monotonic() - began)))
        attacker.close()


def _trained(there: Installation) -> bytes:
    # The one that fuzzes is asked too, once it has said that it is there: it is not waited for.
    view = there.train(APPS / "mean", "--rounds", "3", "--policy", "quorum=4", "--round-timeout", "4")
    assert view.state == "completed", view.reason
    assert {"eu-1", "eu-2", "us-1", "us-2"} <= set(view.participants)
    return (there.out(view.run) / "final.npz").read_bytes()


@pytest.mark.slow
@pytest.mark.timeout(FUZZ_S + 300)
async def test_what_the_others_train_is_the_same_to_the_byte(installation: Installation, tmp_path: Path) -> None:
    undisturbed = await asyncio.to_thread(_trained, installation)
    token = (await asyncio.to_thread(installation.run, "fleet", "token", "create")).stdout.strip()
    url = installation.leaf("eu")
    config = agent_config(tmp_path, node="evil-1", nats_url=url, join_token=token)
    access = await Enrolment(config, trust_store(config)).access()
    assert access.credentials is not None
    fuzzer = Fuzzer(urlsplit(url).port or 0, Credentials.load(access.credentials), "evil-1")
    coordinator = psutil.Process(installation.child("coordinator"))
    before, until = coordinator.memory_info().rss, asyncio.Event()
    fuzzing = asyncio.create_task(fuzzer.run(until))
    began, runs = time.monotonic(), 0
    while time.monotonic() - began < FUZZ_S or runs == 0:
        assert await asyncio.to_thread(_trained, installation) == undisturbed
        runs += 1
    until.set()
    await fuzzing
    assert fuzzer.fired > 1_000
    assert coordinator.is_running(), "nothing a node sends ends the coordinator"
    assert coordinator.memory_info().rss - before < MEGABYTES * 2**20
    nodes = {node.name: node for node in installation.nodes()}
    assert {name for name, node in nodes.items() if node.state == "online"} >= {"eu-1", "eu-2", "us-1", "us-2"}
    assert nodes["eu-1"].region == "eu" and nodes["eu-1"].cpus > 1, "nobody speaks for another"
    assert installation.json("fleet", "token", "ls"), "the log still takes events"
    assert installation.run("fleet", "revoke", "evil-1").returncode == 0
    assert await asyncio.to_thread(_trained, installation) == undisturbed
