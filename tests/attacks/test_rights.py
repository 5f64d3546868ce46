"""Every right of every role, fired with hostile replies, bodies, headers, sizes and names, at real servers.

The attacks are made from the lists of rights themselves, so a new right is attacked without a line here. What is
asserted needs no list of outcomes either: whatever changes in a stream stands under a subject that the attacker may
publish to.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from fedtide.fabric.ids import unguessable
from fedtide.fabric.nats import jwt as nats_jwt
from fedtide.fabric.nats import permissions
from fedtide.fabric.nats.accounts import CORE, NODES, RUNS, accounts, covers, region_account
from fedtide.fabric.nats.jetstream import Received
from fedtide.fabric.nats.permissions import AGGREGATOR, NODE, SYSTEM, Permissions
from fedtide.fabric.nats.subjects import Subjects, up_stream
from tests.attacks.ground import REGIONS, ROLES, SUBJECTS, Attacker, Ground, Role, Stored, shots

VICTIM = Role(NODE, NODES, "eu-2", "eu", "eu")


@pytest.fixture
async def ground(tmp_path: Path) -> AsyncIterator[Ground]:
    there = Ground(tmp_path)
    try:
        await there.begin()
        await there.seed()
        yield there
    finally:
        await there.end()


class Victim:
    """An honest node that is asked, told and answered while others attack."""

    def __init__(self, ground: Ground) -> None:
        self._ground = ground
        self.live: list[Received] = []

    async def begin(self) -> None:
        self.broker = await self._ground.member(VICTIM)
        await self.broker.subscribe(SUBJECTS.live_node("eu", "eu-2"), self._on_live)
        await self.broker.answer(SUBJECTS.infer("eu", "eu-2", "*"), self._infer)
        await self._ground.coordinator.answer(SUBJECTS.orders("eu", "eu-2"), self._orders)

    async def _on_live(self, message: Received) -> None:
        self.live.append(message)

    async def _infer(self, message: Received) -> tuple[bytes, dict[str, str]]:
        return b"predicted", {}

    async def _orders(self, message: Received) -> tuple[bytes, dict[str, str]]:
        return b"orders", {}

    async def works(self, number: int) -> None:
        """It is told a task and answers, is asked for a prediction, and asks for its orders; all of it arrives."""
        coordinator, broker = self._ground.coordinator, self.broker
        task, said = SUBJECTS.task("eu", "eu-2", "run-9", f"t{number}"), f"work {number}".encode()
        await coordinator.publish(task, said)
        async with asyncio.timeout(20):
            while not any(m.data == said for m in self.live):  # noqa: ASYNC110 - nothing tells
                await asyncio.sleep(0.01)
            assert (await broker.last("DOWN", task, domain=broker.streams_of("eu"))).data == said
            report = SUBJECTS.report("eu", "eu-2", f"work-{number}")
            await broker.publish(report, said, message_id=unguessable())
            while (stored := await coordinator.last(up_stream("eu"), report)) is None:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
            assert stored.data == said
            assert await coordinator.ask(SUBJECTS.infer("eu", "eu-2", "m")) == b"predicted"
            assert await broker.ask(SUBJECTS.orders("eu", "eu-2")) == b"orders"


def not_its_own(role: Role, before: Stored, after: Stored) -> list[str]:
    """What changed in any stream, and is under no subject that the role may publish to."""
    own = [role.spelled(pattern) for pattern in role.allowed().publish]
    if role.name == "leaf":  # a region's server may say anything of its region: its streams are its own
        own += [f"{SUBJECTS.root}.{kind}.{role.user.removeprefix('leaf-')}.>" for kind in ("up", "stay", "cache")]
    changed = [
        f"{server} {stream} {subject}"
        for (server, stream), held in after.items()
        for subject in held.keys() | before[server, stream].keys()
        if held.get(subject) != before[server, stream].get(subject)
        # In what was published these are no wildcards.
        and not any(covers(pattern, subject.replace(">", "x").replace("*", "x")) for pattern in own)
    ]
    return [each for each in changed if ".run-9." not in each and ".rpt.work-" not in each]


@pytest.mark.parametrize("role", ROLES, ids=lambda role: role.name)
async def test_a_role_changes_nothing_but_what_is_its_own(ground: Ground, role: Role) -> None:
    victim = Victim(ground)
    await victim.begin()
    await victim.works(0)
    configs, before = await ground.configs(), await ground.stored()
    evil = await ground.attacker(role)
    fired = 0
    for subject, body, reply, headers in shots(role):
        evil.fire(subject, body, reply, headers)
        fired += 1
        if (fired % 50 == 0 or len(subject) > 4_000) and not await evil.flush():  # a name was longer than is taken
            evil.close()
            evil = await ground.attacker(role)
    await evil.flush()
    await victim.works(1)
    await asyncio.sleep(0.5)  # what the attack set going ends somewhere: nothing tells when
    assert fired > 100 or not role.allowed().publish
    assert await ground.configs() == configs
    assert not_its_own(role, before, await ground.stored()) == []
    told = {m.data for m in victim.live if m.data and not m.data.startswith(b"work ")}
    by_the_cloud = {b"desired of eu-2", b"task of eu-2", b"app", b"model", b"release"}
    assert told <= by_the_cloud, "it is told what only the cloud has written"
    await victim.works(2)
    evil.close()
    await victim.broker.close()


async def test_rights_are_the_same_after_an_account_has_changed(ground: Ground) -> None:
    """That others are withdrawn reaches servers as a new account: it gives nobody who is connected other rights."""
    withdrawn = [replace(role, user="withdrawn") for role in ROLES if role.name in (NODE, AGGREGATOR)]
    keys = [ground.credentials(role) for role in withdrawn]
    leaving = [
        await Attacker.at(ground.servers[role.server].port, key) for role, key in zip(withdrawn, keys, strict=True)
    ]
    victim = Victim(ground)
    await victim.begin()
    members = {role: await ground.attacker(role) for role in ROLES}
    before = {role: await refusals(member, role) for role, member in members.items()}
    assert all(any(refused) and not all(refused) for refused in before.values())

    now = datetime.now(UTC)
    void = {each.key.public: (now, now + timedelta(days=1)) for each in keys}
    system = await ground.broker("hub", ground.authority.credentials(SYSTEM, SYSTEM, "c"))
    for jwt in ground.authority.account_jwts(REGIONS, lambda _: void).values():
        await system.tell("$SYS.REQ.CLAIMS.UPDATE", jwt.encode())
    async with asyncio.timeout(30):
        for each in leaving:
            while await each.flush():  # noqa: ASYNC110 - nothing tells
                await asyncio.sleep(0.01)
    assert {role: await refusals(member, role) for role, member in members.items()} == before
    await victim.works(0)

    for member in (*leaving, *members.values()):
        member.close()
    await system.close()
    await victim.broker.close()


async def test_a_region_stays_linked_when_the_account_of_the_cloud_changes(ground: Ground) -> None:
    """Its own imports from there: nats-server then goes through what the link has subscribed to."""
    victim = Victim(ground)
    await victim.begin()
    claims = nats_jwt.read(ground.authority.account_jwts(REGIONS)[CORE])
    about = {key: value for key, value in claims["nats"].items() if key not in ("type", "version")}
    about["signing_keys"].append(nats_jwt.Key.new(nats_jwt.ACCOUNT).public)
    changed = nats_jwt.sign(
        "account", claims["sub"], claims["name"], about, ground.authority._signing, issued=time.time()
    )
    system = await ground.broker("hub", ground.authority.credentials(SYSTEM, SYSTEM, "c"))
    answer = json.loads(await system.ask("$SYS.REQ.CLAIMS.UPDATE", changed.encode()))
    assert answer["data"]["code"] == 200
    await victim.works(0)
    await system.close()
    await victim.broker.close()


async def refusals(member: Attacker, role: Role) -> list[bool]:
    """Of everything that any role may publish or subscribe to, and of everything else: what this one is refused."""
    rights = {(each.spelled(p), p in each.allowed().publish) for each in ROLES for p in all_of(each.allowed())}
    found = []
    for pattern, publishes in sorted({*rights, (">", False), (f"{SUBJECTS.root}.evt.>", True), ("x", True)}):
        before = member.refused
        if publishes:
            member.fire(pattern.replace("*", "x").replace(">", "x"), b"", "x", {})
        else:
            member.listen(pattern)
        assert await member.flush(), role.name
        found.append(member.refused > before)
    return found


def all_of(allowed: Permissions) -> tuple[str, ...]:
    return *allowed.publish, *allowed.subscribe


def test_every_role_is_attacked_and_none_may_call_what_says_in_its_body_what_it_is_about() -> None:
    """But for purges, consumers and lists such rights cannot be told from harmless ones by their subject."""
    attacked = {(role.account, role.name) for role in ROLES}
    for account in (*accounts(SUBJECTS, REGIONS), SYSTEM):
        for name, allowed in permissions.of_account(SUBJECTS, account).items():
            if account == CORE:
                assert name == permissions.COORDINATOR, "the coordinator, a standby too, may do everything"
                continue
            if account == SYSTEM:
                assert not allowed.publish or name == permissions.SYSTEM
                continue
            if account != region_account("us"):
                assert (account, name) in attacked
            for subject in allowed.publish:
                assert not any(verb in subject for verb in ("STREAM.", "CONSUMER.CREATE", "CONSUMER.DELETE")), subject


def test_what_an_account_imports_its_source_exports() -> None:
    found = accounts(Subjects(), REGIONS)
    for name, about in found.items():
        for each in about.imports:
            exported = [e.subject for e in found[each.account].exports if e.kind == each.kind]
            assert any(covers(wide, each.subject) for wide in exported), f"{name}: {each}"
    assert {name for name, about in found.items() if about.jetstream} == {CORE, "leaf-eu", "leaf-us"}
    # What the release authority alone answers, and the coordinator alone asks.
    assert [e.subject for e in found[RUNS].exports] == [Subjects().signing]
