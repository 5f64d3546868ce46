"""A hostile tenant, with every credential of its accounts, its coordinator's and its servers' own among them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from fedtide.fabric.errors import StoreFull
from fedtide.fabric.nats import jwt as nats_jwt
from fedtide.fabric.nats import permissions
from fedtide.fabric.nats.accounts import CORE
from fedtide.fabric.nats.authority import Authority
from fedtide.fabric.nats.jetstream import Received
from fedtide.fabric.nats.permissions import SYSTEM, SYSTEM_LEAF, claims_of
from fedtide.fabric.nats.subjects import Subjects
from tests.attacks.ground import BODIES, HEADERS, REGIONS, REPLIES, ROLES, SUBJECTS, Attacker, Ground, Role, shots
from tests.attacks.test_rights import Victim

QUOTA_BYTES = 10**8
MINE = Subjects("evil")
OWN = (*ROLES, Role(permissions.COORDINATOR, CORE, "c", "hub"), Role(SYSTEM, SYSTEM, "c", "hub"))
OWN = (*OWN, Role(SYSTEM_LEAF, SYSTEM, "leaf-eu", "hub"))


@dataclass
class Hostile:
    """A tenant of the same hub, with regions of the same names."""

    ground: Ground
    authority: Authority

    async def attacker(self, role: Role) -> Attacker:
        shown = self.authority.credentials(role.account, role.name, role.user, region=role.region)
        return await Attacker.at(self.ground.servers["hub"].port, shown)


@pytest.fixture
async def hostile(tmp_path: Path) -> AsyncIterator[Hostile]:
    ground = Ground(tmp_path)
    try:
        await ground.begin()
        await ground.seed()
        evil = ground.authority.of_tenant("evil", "1", QUOTA_BYTES)
        system = await ground.broker("hub", ground.authority.credentials(SYSTEM, SYSTEM, "c"))
        on_hub = ground.authority.on_hub(evil)
        for jwt in (on_hub.system_jwt(), *reversed(on_hub.account_jwts(REGIONS).values())):
            answer = json.loads(await system.ask(claims_of(nats_jwt.read(jwt)["sub"]), jwt.encode()))
            assert answer["data"]["code"] == 200
        await system.close()
        yield Hostile(ground, evil)
    finally:
        await ground.end()


async def test_it_changes_nothing_of_another_and_hears_nothing_of_it(hostile: Hostile) -> None:
    ground = hostile.ground
    victim = Victim(ground)
    await victim.begin()
    await victim.works(0)
    configs, before = await ground.configs(), await ground.stored()
    heard = await ground.broker("hub", hostile.authority.credentials(CORE, permissions.COORDINATOR, "ears"))
    told: list[str] = []

    async def hear(message: Received) -> None:
        told.append(message.subject)

    await heard.subscribe(f"{SUBJECTS.root}.>", hear)
    await heard.subscribe("DELIVER.>", hear)
    for role in OWN:
        evil, number = await hostile.attacker(role), 0
        for number, (subject, body, reply, headers) in enumerate(_shots(role)):
            evil.fire(subject, body, reply, headers)
            if (number % 50 == 0 or len(subject) > 4_000) and not await evil.flush():
                evil.close()
                evil = await hostile.attacker(role)
        await evil.flush()
        assert number > 500
        evil.close()
    del told[:]  # what the attackers said to themselves
    await victim.works(1)
    await asyncio.sleep(0.5)  # what the attack set going ends somewhere: nothing tells when
    assert await ground.configs() == configs
    after = await ground.stored()
    changed = {
        f"{where} {subject}"
        for where, held in after.items()
        for subject in held.keys() | before[where].keys()
        if held.get(subject) != before[where].get(subject) and ".run-9." not in subject and ".rpt.work-" not in subject
    }
    assert changed == set()
    assert {m.data for m in victim.live} <= {b"work 0", b"work 1"}
    assert told == []
    await victim.works(2)
    await heard.close()
    await victim.broker.close()


def _shots(role: Role) -> Iterator[tuple[str, bytes, str, dict[str, str]]]:
    """What it may do in its own name, and whatever it is forbidden, in the name of its victim."""
    yield from ((s.replace(SUBJECTS.root, MINE.root), *rest) for s, *rest in shots(role))
    yield from ((subject, body, REPLIES[0], {}) for subject in REPLIES for body in BODIES)
    yield from ((subject, BODIES[1], REPLIES[0], headers) for subject in REPLIES for headers in HEADERS)


async def test_no_region_of_another_lets_it_in(hostile: Hostile) -> None:
    port = hostile.ground.servers["eu"].port
    shown = [hostile.authority.credentials(r.account, r.name, r.user, region=r.region) for r in OWN]
    found = await asyncio.gather(*(Attacker.at(port, each) for each in shown), return_exceptions=True)
    assert [str(each) for each in found] == ["it is not let in"] * len(OWN)


async def test_it_stores_no_more_than_its_quota(hostile: Hostile) -> None:
    broker = await hostile.ground.broker("hub", hostile.authority.credentials(CORE, permissions.COORDINATOR, "c"))
    config = {"name": "MINE", "subjects": [f"{MINE.root}.x.>"], "storage": "file"}
    with pytest.raises(StoreFull):
        await broker.ensure_stream({**config, "max_bytes": 2 * QUOTA_BYTES})
    await broker.ensure_stream({**config, "max_bytes": QUOTA_BYTES - 10**6})
    with pytest.raises(StoreFull):
        await broker.ensure_stream({**config, "name": "MORE", "subjects": ["more"], "max_bytes": 10**7})
    await broker.close()


def test_what_its_regions_get_names_nobody_else(hostile: Hostile) -> None:
    """No key, account or operator of the installation, nor of another tenant."""
    mine = hostile.authority.trust(REGIONS)
    others = [hostile.ground.authority, hostile.ground.authority.of_tenant("other", "1", None)]
    for other in others:
        for account in (CORE, SYSTEM, "runs", "nodes", "region-eu", "leaf-eu"):
            assert other.public(account) not in mine
    again = hostile.ground.authority.of_tenant("evil", "2", QUOTA_BYTES)
    assert again.public(CORE) != hostile.authority.public(CORE), "a later tenant of the same name is another one"
