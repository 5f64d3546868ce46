"""Many withdrawn keys: servers take the accounts that name them, and shut out whom they name."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from fedtide.coordinator.identity import identities
from fedtide.fabric.errors import CredentialsRefused
from fedtide.fabric.nats.accounts import MOST_REGIONS, NODES, RUNS
from fedtide.fabric.nats.authority import Void
from fedtide.fabric.nats.credentials import Credentials
from fedtide.fabric.nats.jwt import USER, Key
from fedtide.fabric.nats.permissions import AGGREGATOR, NODE, SYSTEM
from tests.attacks.ground import REGIONS, Ground, Role


@pytest.fixture
async def ground(tmp_path: Path) -> AsyncIterator[Ground]:
    there = Ground(tmp_path)
    try:
        await there.begin()
        yield there
    finally:
        await there.end()


async def _tell(ground: Ground, account: str, void: Void) -> None:
    """Tell the hub's server the accounts of as many regions as there can be."""
    system = await ground.broker("hub", ground.authority.credentials(SYSTEM, SYSTEM, "coordinator"))
    regions = [*REGIONS, *(f"region-{n}" for n in range(MOST_REGIONS - len(REGIONS)))]
    jwts = ground.authority.account_jwts(regions, lambda name: void if name == account else {})
    for name, jwt in reversed(jwts.items()):  # those of regions first: others import from them
        if name != account:
            await system.tell("$SYS.REQ.CLAIMS.UPDATE", jwt.encode())
    said = await system.ask("$SYS.REQ.CLAIMS.UPDATE", jwts[account].encode())
    assert b'"code":200' in said, said
    await system.close()


async def _is_let_in(ground: Ground, server: str, credentials: Credentials) -> bool:
    try:
        broker = await ground.broker(server, credentials)
    except CredentialsRefused:
        return False
    await broker.close()
    return True


async def test_as_many_nodes_as_an_account_can_name_are_shut_out(ground: Ground) -> None:
    now = datetime.now(UTC)
    honest, revoked = (ground.credentials(Role(NODE, NODES, name, "eu", "eu")) for name in ("eu-1", "eu-2"))
    strangers = {Key.new(USER).public: now for _ in range(identities.MOST_NAMED + 50)}
    withdrawn = {key: (at, at + timedelta(days=90)) for key, at in {**strangers, revoked.key.public: now}.items()}
    void = identities.void_in(identities.Identities(withdrawn=withdrawn), NODES)
    await _tell(ground, NODES, void)
    assert await _is_let_in(ground, "hub", honest)
    assert not await _is_let_in(ground, "hub", revoked)


async def test_ended_runs_are_shut_out_by_a_date_and_those_that_go_on_are_not(ground: Ground) -> None:
    now = datetime.now(UTC)
    ended, goes_on = (ground.credentials(Role(AGGREGATOR, RUNS, name, "hub")) for name in ("run-1", "run-2"))
    runs = {Key.new(USER).public: now - timedelta(days=1) for _ in range(identities.RUNS_NAMED)}
    void = {key: (at, at + timedelta(days=30)) for key, at in {**runs, ended.key.public: now}.items()}
    # Both were issued just now: the one is named, the other is after the date.
    await _tell(ground, RUNS, identities.in_fewer(void, now))
    assert await _is_let_in(ground, "hub", goes_on)
    assert not await _is_let_in(ground, "hub", ended)
    # With nobody named, the date alone shuts out what was issued before.
    later = now + identities.CLOCKS_DIFFER + timedelta(minutes=1)
    await _tell(ground, RUNS, identities.in_fewer(void, later))
    assert not await _is_let_in(ground, "hub", goes_on)
