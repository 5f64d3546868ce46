"""Who leads, when processes freeze and the broker goes away; seconds pass in no time here."""

from __future__ import annotations

import asyncio

import pytest

from fedtide.coordinator.log.leader_lease import LEASE_S, Leadership
from fedtide.fabric.errors import StaleWriter
from fedtide.fabric.nats.subjects import Subjects
from tests.shell.fake_broker import FakeNats

pytestmark = pytest.mark.looptime


def candidate(nats: FakeNats, name: str) -> Leadership:
    return Leadership(nats.connect(), Subjects(), name, f"http://{name}")


async def seconds(waited_for: asyncio.Task[None]) -> float:
    began = asyncio.get_running_loop().time()
    await waited_for
    return asyncio.get_running_loop().time() - began


async def test_the_first_leads_at_once(nats: FakeNats) -> None:
    one = candidate(nats, "one")
    assert await seconds(asyncio.create_task(one.acquire())) == 0 and one.is_mine


async def test_a_lease_that_is_kept_is_not_taken(nats: FakeNats) -> None:
    one, two = candidate(nats, "one"), candidate(nats, "two")
    await one.acquire()
    keeping, waiting = asyncio.create_task(one.keep()), asyncio.create_task(two.acquire())
    await asyncio.sleep(20 * LEASE_S)
    assert not waiting.done() and two.leader is not None and two.leader.holder == "one"
    keeping.cancel()
    waiting.cancel()


async def test_the_lease_of_one_that_is_gone_is_taken_when_it_is_over(nats: FakeNats) -> None:
    one, two = candidate(nats, "one"), candidate(nats, "two")
    await one.acquire()
    assert await seconds(asyncio.create_task(two.acquire())) == pytest.approx(LEASE_S, abs=0.5)
    assert two.is_mine


async def test_a_lease_that_was_released_is_taken_at_once(nats: FakeNats) -> None:
    one, two = candidate(nats, "one"), candidate(nats, "two")
    await one.acquire()
    waiting = asyncio.create_task(two.acquire())
    await asyncio.sleep(0.1)
    await one.release()
    assert await seconds(waiting) < 0.1


async def test_whoever_was_frozen_learns_that_it_leads_no_more(nats: FakeNats) -> None:
    one, two = candidate(nats, "one"), candidate(nats, "two")
    await one.acquire()
    await two.acquire()
    with pytest.raises(StaleWriter):
        await one.keep()
    assert not one.is_mine


async def test_after_a_freeze_nothing_is_taken_in_before_the_lease_is_confirmed(nats: FakeNats) -> None:
    one = candidate(nats, "one")
    await one.acquire()
    await one.wait_until_fresh()
    await asyncio.sleep(10)
    asking = asyncio.create_task(one.wait_until_fresh())
    await asyncio.sleep(1)
    assert not asking.done()
    keeping = asyncio.create_task(one.keep())
    await asking
    keeping.cancel()


async def test_a_renewal_survives_a_lost_confirmation_and_a_broker_that_is_away(nats: FakeNats) -> None:
    one = candidate(nats, "one")
    await one.acquire()
    keeping = asyncio.create_task(one.keep())
    nats.lose_confirmations = 1
    await asyncio.sleep(5)
    nats.down = True
    await asyncio.sleep(60)
    nats.down = False
    await one.wait_until_fresh()
    assert one.is_mine
    keeping.cancel()
