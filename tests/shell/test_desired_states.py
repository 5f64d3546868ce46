"""Desired states: a leader that was frozen between reading and publishing does not cover a newer one."""

from __future__ import annotations

import dataclasses
from datetime import UTC, datetime

from fedtide.coordinator.adapters.distribution import Distribution
from fedtide.coordinator.commands import SetDesired
from fedtide.fabric.encoding import from_json
from fedtide.fabric.nats.jetstream import Received
from fedtide.fabric.nats.subjects import ORDERS, Subjects
from fedtide.fabric.plans.rollout_plan import Desired
from tests.scenarios.build import Story, joined, ref
from tests.shell.fake_broker import FakeBroker, FakeNats

SUBJECTS = Subjects()
DESIRED = SUBJECTS.desired("eu", "n1", "m")


def command(counter: int, release: str = "e") -> SetDesired:
    return SetDesired("n1", "m", counter, "ro-1", ref(release))


def story() -> Story:
    it = Story()
    it.tell(joined("n1"))
    return it


async def stored(broker: FakeBroker) -> Desired:
    found = await broker.last(ORDERS, DESIRED)
    assert found is not None
    return from_json(Desired, found.data, "desired")


async def test_the_newest_desired_state_stays_however_late_an_older_one_is_written(
    nats: FakeNats, broker: FakeBroker
) -> None:
    world = story().world
    frozen, newer = nats.connect(), Distribution(broker, SUBJECTS)
    read = frozen.last
    thawed = False

    async def slow(stream: str, subject: str, **options: object) -> Received | None:
        nonlocal thawed
        found = await read(stream, subject)
        if not thawed:
            thawed = True
            await newer.set_desired(command(8, "f"), world)  # the roll-back of the leader that followed
        return found

    frozen.last = slow
    await Distribution(frozen, SUBJECTS).set_desired(command(7), world)
    assert (await stored(broker)).counter == 8


async def test_one_that_cannot_be_read_is_replaced(broker: FakeBroker) -> None:
    await broker.publish(DESIRED, b"\xff{")
    await Distribution(broker, SUBJECTS).set_desired(command(1), story().world)
    assert (await stored(broker)).counter == 1


async def test_the_same_twice_is_written_once(broker: FakeBroker) -> None:
    for _ in range(2):
        await Distribution(broker, SUBJECTS).set_desired(command(1), story().world)
    assert await broker.last_sequence(ORDERS) == 1


async def test_an_offer_that_comes_late_does_not_cover_what_the_node_keeps(broker: FakeBroker) -> None:
    kept, world = command(1), story().world
    offer = dataclasses.replace(kept, expires_at=datetime(2026, 5, 1, tzinfo=UTC))
    for each in (offer, kept, offer):
        await Distribution(broker, SUBJECTS).set_desired(each, world)
    assert (await stored(broker)).expires_at is None
