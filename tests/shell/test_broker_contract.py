"""What everybody relies on of a broker. The fake and the real one pass the same claims."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest

from fedtide.fabric.errors import BrokerUnavailable, StaleWriter
from fedtide.fabric.nats.broker import Broker
from fedtide.fabric.nats.jetstream import Delivery, Received
from fedtide.fabric.nats.streams import hub_streams
from fedtide.fabric.nats.subjects import CONTROL, EVENTS, UP, Subjects
from fedtide.fabric.process.retry import until_done
from tests.conftest import NatsServer
from tests.shell.fake_broker import FakeNats

SUBJECTS = Subjects()
LOG = logging.getLogger(__name__)
LEASE = SUBJECTS.lease
Connect = Callable[[], Awaitable[Broker]]


@pytest.fixture(params=["fake", "real"])
async def connect(request: pytest.FixtureRequest) -> AsyncIterator[Connect]:
    """Connections to one server that has the streams of a hub."""
    made: list[Broker] = []
    server = FakeNats() if request.param == "fake" else request.getfixturevalue("hub")

    async def one() -> Broker:
        if isinstance(server, NatsServer):
            broker = await Broker.connect(server.url, "contract")
        else:
            broker = server.connect()
        made.append(broker)
        return broker

    first = await one()
    for config in hub_streams(SUBJECTS):
        await first.ensure_stream(config)
    yield one
    for broker in made:
        await broker.close()


def event(name: str) -> str:
    return SUBJECTS.event("test", name)


def report(name: str) -> str:
    return SUBJECTS.report("hub", name, "test")


async def test_sequences_count_from_one(connect: Connect) -> None:
    broker = await connect()
    acks = [await broker.publish(event(name), b"") for name in ("a", "b")]
    assert [ack.sequence for ack in acks] == [1, 2] and await broker.last_sequence(EVENTS) == 2


async def test_the_same_id_is_stored_once(connect: Connect) -> None:
    broker = await connect()
    first, again = [await broker.publish(event("a"), b"x", message_id="id") for _ in range(2)]
    assert (again.sequence, again.duplicate, first.duplicate) == (first.sequence, True, False)


async def test_who_does_not_know_the_last_sequence_is_refused(connect: Connect) -> None:
    broker = await connect()
    await broker.publish(event("a"), b"", expected_last=0)
    with pytest.raises(StaleWriter):
        await broker.publish(event("b"), b"", expected_last=0)
    assert await broker.last_sequence(EVENTS) == 1


async def test_who_does_not_know_the_last_of_a_subject_is_refused(connect: Connect) -> None:
    broker = await connect()
    await broker.publish(SUBJECTS.snapshot, b"", expected_last_of_subject=0)
    await broker.publish(LEASE, b"", expected_last_of_subject=0)
    with pytest.raises(StaleWriter):
        await broker.publish(LEASE, b"", expected_last_of_subject=0)


async def test_what_no_stream_captures_is_not_confirmed(connect: Connect) -> None:
    with pytest.raises(BrokerUnavailable):
        await (await connect()).publish("nobody.stores.this", b"", timeout_s=1)


async def test_a_stream_of_one_message_a_subject_keeps_the_newest(connect: Connect) -> None:
    broker = await connect()
    for data in (b"old", b"new"):
        await broker.publish(LEASE, data)
    found = await broker.last(CONTROL, LEASE)
    assert found is not None and (found.data, found.subject, found.sequence) == (b"new", LEASE, 2)
    assert [m.data for m in await broker.last_of_each(CONTROL, SUBJECTS.all_control)] == [b"new"]


async def test_of_a_subject_without_messages_there_is_no_last(connect: Connect) -> None:
    assert await (await connect()).last(CONTROL, LEASE) is None


async def test_reading_goes_on_from_a_sequence_in_batches(connect: Connect) -> None:
    broker = await connect()
    for name in ("a", "b", "c"):
        await broker.publish(event(name), name.encode())
    assert [m.data for m in await broker.read_from(EVENTS, 2)] == [b"b", b"c"]
    assert [m.sequence for m in await broker.read_from(EVENTS, 1, batch=2)] == [1, 2]
    assert await broker.read_from(EVENTS, 4) == []


async def test_a_purge_takes_what_is_under_the_pattern_and_nothing_else(connect: Connect) -> None:
    broker = await connect()
    for name in ("a", "b"):
        await broker.publish(report(name), b"")
    assert await broker.purge(UP, report("a")) == 1
    assert await broker.subjects_of(UP, SUBJECTS.reports_of("hub")) == {report("b")}


async def test_a_subscriber_hears_what_is_published_and_told(connect: Connect) -> None:
    broker, heard = await connect(), asyncio.Queue[bytes]()

    async def hear(message: Received) -> None:
        heard.put_nowait(message.data)

    stop = await broker.subscribe(SUBJECTS.all_events, hear)
    await broker.publish(event("a"), b"published")
    await broker.tell(event("b"), b"told")
    assert {await heard.get(), await heard.get()} == {b"published", b"told"}
    await stop()


async def test_a_question_is_answered_with_headers(connect: Connect) -> None:
    answering, asking = await connect(), await connect()

    async def answer(question: Received) -> tuple[bytes, dict[str, str]]:
        return question.data.upper(), {"Seen": question.headers["Asked"]}

    await answering.answer("a.question", answer)

    async def ask() -> Received:  # what one connection listens to, another may reach a moment later
        return await asking.ask_with_headers("a.question", b"why", {"Asked": "me"})

    answered = await until_done(LOG, "test.waits", ask)
    assert (answered.data, answered.headers["Seen"]) == (b"WHY", "me")


async def test_a_question_without_an_answerer_fails(connect: Connect) -> None:
    with pytest.raises(BrokerUnavailable):
        await (await connect()).ask("a.question", timeout_s=0.2)


async def test_what_was_not_acknowledged_comes_again_to_the_successor(connect: Connect) -> None:
    broker = await connect()
    for name in ("a", "b"):
        await broker.publish(report(name), name.encode())
    first = await take(broker, 2)
    await first[0].ack()
    while (await broker.backlog(UP, "contract"))[1] != 1:
        pass  # an acknowledgement is not confirmed: ask until it has arrived
    assert [d.data for d in await take(broker, 1)] == [b"b"]


async def test_a_consumer_gets_what_comes_later_in_order(connect: Connect) -> None:
    broker = await connect()
    taking = asyncio.create_task(take(broker, 2))
    for name in ("a", "b"):
        await broker.publish(report(name), name.encode())
    assert [(d.data, d.sequence) for d in await taking] == [(b"a", 1), (b"b", 2)]


async def take(broker: Broker, wanted: int) -> list[Delivery]:
    """The next deliveries of the durable consumer `contract`; nothing of them is acknowledged."""
    found: list[Delivery] = []
    consumed = broker.consume(UP, "contract", SUBJECTS.reports_of("hub"))
    async for delivery in consumed:
        found.append(delivery)
        if len(found) == wanted:
            break
    await consumed.aclose()
    return found
