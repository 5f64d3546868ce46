"""The broker link and blob transfer against real nats-servers."""

from __future__ import annotations

import asyncio
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from fedtide.coordinator.adapters.topology import Topology as Streams
from fedtide.coordinator.commands import Commands
from fedtide.coordinator.log.engine import Engine
from fedtide.coordinator.log.event_log import EventLog
from fedtide.coordinator.log.snapshots import Snapshots
from fedtide.fabric.encoding import to_json
from fedtide.fabric.errors import BrokerUnavailable, DigestMismatch, NotFound, StaleWriter
from fedtide.fabric.events.envelope import CoordinatorElected, Event, NodeOnline
from fedtide.fabric.nats import stream_reads
from fedtide.fabric.nats.broker import Broker
from fedtide.fabric.nats.jetstream import Received
from fedtide.fabric.nats.streams import HUB_DOMAIN
from fedtide.fabric.nats.subjects import DOWN, EVENTS, HUB_REGION, UP, Subjects, up_stream
from fedtide.fabric.nats.transfer import FileSink, Source, expires, get_blob, put_blob, read_blob
from fedtide.fabric.tensors.blobs import CHUNK_BYTES, BlobRef
from tests.conftest import NatsServer, Topology
from tests.integration.installation import until
from tests.scenarios.build import joined

SUBJECTS = Subjects()


def _logged(key: str) -> tuple[Event, bytes]:
    event = _event(key)
    return event, to_json(event)


def _event(name: str) -> Event:
    return Event.now("test", NodeOnline(node=name), id=name)


async def test_nobody_there_is_said_within_the_time_given() -> None:
    with pytest.raises(BrokerUnavailable, match="no NATS server answers"):
        await Broker.connect("nats://127.0.0.1:1", "test", wait_s=0.1)


async def test_whoever_is_cancelled_while_its_answer_comes_ends(at_hub: Broker) -> None:
    async def asks() -> None:
        while True:
            await at_hub.ask("$JS.API.INFO")

    for turns in range(200):
        asking = asyncio.create_task(asks())
        await asyncio.sleep(turns * 1e-5)  # a little later each time: some meet the answer
        asking.cancel()
        async with asyncio.timeout(20):
            await asyncio.wait([asking])
        assert asking.cancelled()


async def test_a_task_reaches_a_leaf_live_and_after_its_blob(
    topology: Topology, at_hub: Broker, at_leaf: Broker
) -> None:
    arrived: asyncio.Queue[Received] = asyncio.Queue()
    await at_leaf.subscribe(SUBJECTS.live_node("eu", "n1"), arrived.put)
    data = os.urandom(3 * CHUNK_BYTES + 5)
    ref = await put_blob(at_hub, SUBJECTS.blob, DOWN, [data], ttl_s=60)
    await at_hub.publish(SUBJECTS.task("eu", "n1", "run-1", "t1"), b"go")
    async with asyncio.timeout(10):
        message = await arrived.get()
    assert message.data == b"go"
    assert message.subject == SUBJECTS.task("eu", "n1", "run-1", "t1")
    assert await read_blob(Source(at_leaf, DOWN), SUBJECTS.blob, ref) == data


async def test_what_was_missed_is_read_by_node_newest_of_each(at_hub: Broker, topology: Topology) -> None:
    for subject, data in (("t1", b"1"), ("t2", b"2"), ("t1", b"3")):
        await at_hub.publish(SUBJECTS.task("eu", "n1", "run-1", subject), data)
    await at_hub.publish(SUBJECTS.task("eu", "n2", "run-1", "t1"), b"not mine")
    missed = await at_hub.last_of_each(DOWN, SUBJECTS.down_node("eu", "n1"))
    assert [m.data for m in missed] == [b"2", b"3"]
    assert missed[0].subject == SUBJECTS.task("eu", "n1", "run-1", "t2")


@pytest.mark.parametrize("ttl_s", [None, 60])
async def test_a_blob_that_is_there_is_not_sent_again(at_hub: Broker, ttl_s: float | None) -> None:
    data = os.urandom(2 * CHUNK_BYTES)
    ref = await put_blob(at_hub, SUBJECTS.blob, DOWN, [data], ttl_s=ttl_s)
    before = await at_hub.last_sequence(DOWN)
    assert await put_blob(at_hub, SUBJECTS.blob, DOWN, [data], ttl_s=ttl_s) == ref
    assert await at_hub.last_sequence(DOWN) == before


async def test_an_interrupted_upload_goes_on_at_the_missing_chunk(at_hub: Broker) -> None:
    data = os.urandom(3 * CHUNK_BYTES)
    ref = await put_blob(at_hub, SUBJECTS.blob, DOWN, [data], ttl_s=60)
    before = await at_hub.last_sequence(DOWN)
    await at_hub.purge(DOWN, f"{SUBJECTS.blob(ref.digest)}.1")
    await at_hub.purge(DOWN, f"{SUBJECTS.blob(ref.digest)}.m")
    await put_blob(at_hub, SUBJECTS.blob, DOWN, [data], ttl_s=60)
    assert await at_hub.last_sequence(DOWN) == before + 2
    assert await read_blob(Source(at_hub, DOWN), SUBJECTS.blob, ref) == data


async def test_a_kept_blob_never_starts_to_expire_and_an_expiring_one_can_be_kept(at_hub: Broker) -> None:
    kept = await put_blob(at_hub, SUBJECTS.blob, DOWN, [b"release"], ttl_s=None)
    await put_blob(at_hub, SUBJECTS.blob, DOWN, [b"release"], ttl_s=60)
    assert not await expires(at_hub, DOWN, SUBJECTS.blob(kept.digest))
    round_blob = await put_blob(at_hub, SUBJECTS.blob, DOWN, [b"round"], ttl_s=60)
    assert await expires(at_hub, DOWN, SUBJECTS.blob(round_blob.digest))
    await put_blob(at_hub, SUBJECTS.blob, DOWN, [b"round"], ttl_s=None)
    assert not await expires(at_hub, DOWN, SUBJECTS.blob(round_blob.digest))


async def test_a_download_resumes_at_the_missing_chunk(at_hub: Broker, tmp_path: Path) -> None:
    data = os.urandom(3 * CHUNK_BYTES)
    ref = await put_blob(at_hub, SUBJECTS.blob, DOWN, [data], ttl_s=None)
    path = tmp_path / "blob"
    path.write_bytes(data[:CHUNK_BYTES] + b"damaged" + data[CHUNK_BYTES + 7 : 2 * CHUNK_BYTES])
    await at_hub.purge(DOWN, f"{SUBJECTS.blob(ref.digest)}.0")
    await get_blob(Source(at_hub, DOWN), SUBJECTS.blob, ref, FileSink(path))
    assert path.read_bytes() == data


async def test_a_tampered_chunk_is_refused_and_never_reaches_the_file(at_hub: Broker, tmp_path: Path) -> None:
    data = os.urandom(2 * CHUNK_BYTES)
    ref = await put_blob(at_hub, SUBJECTS.blob, DOWN, [data], ttl_s=None)
    await at_hub.publish(f"{SUBJECTS.blob(ref.digest)}.1", b"x" * CHUNK_BYTES)
    path = tmp_path / "blob"
    with pytest.raises(DigestMismatch):
        await get_blob(Source(at_hub, DOWN), SUBJECTS.blob, ref, FileSink(path))
    assert b"xxxx" not in path.read_bytes()


async def test_a_missing_blob_is_not_found_and_a_leaf_falls_back_to_the_hub(at_hub: Broker, at_leaf: Broker) -> None:
    nowhere = BlobRef(digest="0" * 64, size_bytes=1)
    with pytest.raises(NotFound):
        await read_blob(Source(at_hub, DOWN), SUBJECTS.blob, nowhere)
    ref = await put_blob(at_hub, SUBJECTS.blob, DOWN, [b"only at the hub"], ttl_s=None)
    await at_hub.publish(SUBJECTS.task("eu", "n1", "run-1", "fence"), b"")
    while not await at_leaf.last_of_each(DOWN, SUBJECTS.down_node("eu", "n1")):  # noqa: ASYNC110
        await asyncio.sleep(0.01)  # a mirror tells nobody that it has caught up
    await at_leaf.purge(DOWN, f"{SUBJECTS.blob(ref.digest)}.>")
    with pytest.raises(NotFound):
        await read_blob(Source(at_leaf, DOWN), SUBJECTS.blob, ref)
    assert await read_blob(Source(at_leaf, DOWN, HUB_DOMAIN), SUBJECTS.blob, ref) == b"only at the hub"


@pytest.mark.slow  # nats-server itself waits half a minute before a restarted hub asks its leaves again
async def test_reports_published_while_the_hub_is_dead_arrive_once_each(topology: Topology, at_leaf: Broker) -> None:
    topology.hub.kill()
    for number in range(20):
        await at_leaf.publish(SUBJECTS.report("eu", "n1", "x"), str(number).encode(), message_id=f"m{number}")
        await at_leaf.publish(SUBJECTS.report("eu", "n1", "x"), str(number).encode(), message_id=f"m{number}")
    topology.hub.start()
    broker = await Broker.connect(topology.hub.url, "test-reader")
    seen: list[int] = []
    async with asyncio.timeout(60):
        async for delivery in broker.consume(up_stream("eu"), "test", SUBJECTS.reports_of("eu")):
            seen.append(int(delivery.data))
            await delivery.ack()
            if len(seen) == 20:
                break
    assert seen == list(range(20))
    await broker.close()


async def test_a_delivery_that_was_not_acknowledged_comes_again_to_the_next_consumer(
    at_hub: Broker, at_leaf: Broker
) -> None:
    for name in ("a", "b"):
        await at_leaf.publish(SUBJECTS.report("eu", "n1", "x"), name.encode())
    first = at_hub.consume(up_stream("eu"), "durable", SUBJECTS.reports_of("eu"))
    taken = await anext(first)
    assert taken.data == b"a"
    await taken.ack()
    while await at_hub.backlog(up_stream("eu"), "durable") != (0, 1):  # noqa: ASYNC110 - a server has no event to wait for
        await asyncio.sleep(0.01)
    await first.aclose()
    async for delivery in at_hub.consume(up_stream("eu"), "durable", SUBJECTS.reports_of("eu")):
        assert delivery.data == b"b"
        break


async def test_a_process_that_dies_while_it_takes_over_does_not_bring_back_what_was_acknowledged(
    at_hub: Broker, at_leaf: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a", "b"):
        await at_leaf.publish(SUBJECTS.report("eu", "n1", "x"), name.encode())
    taken = await anext(at_hub.consume(up_stream("eu"), "dies", SUBJECTS.reports_of("eu")))
    await taken.ack()
    while await at_hub.backlog(up_stream("eu"), "dies") != (0, 1):  # noqa: ASYNC110 - a server has no event to wait for
        await asyncio.sleep(0.01)
    call, made = at_hub._call, 0

    async def dies(subject: str, body: bytes, domain: str | None) -> dict[str, Any]:
        nonlocal made
        if made == lives:
            raise ConnectionAbortedError
        made += 1
        return await call(subject, body, domain)

    for lives in range(100):
        made = 0
        monkeypatch.setattr(at_hub, "_call", dies)
        consumed = at_hub.consume(up_stream("eu"), "dies", SUBJECTS.reports_of("eu"))
        with suppress(ConnectionAbortedError):
            assert (await anext(consumed)).data == b"b"
        await consumed.aclose()
        monkeypatch.undo()
        async for delivery in at_hub.consume(up_stream("eu"), "dies", SUBJECTS.reports_of("eu")):
            assert delivery.data == b"b", f"after {lives} calls"
            break
        if made < lives:
            assert made >= 6, "the test has not seen every step"
            return
    pytest.fail("the take-over does not end")


async def test_a_consumer_that_is_gone_is_made_again(
    at_hub: Broker, at_leaf: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream_reads, "UNKNOWN_FOR_S", 1.0)
    await at_leaf.publish(SUBJECTS.report("eu", "n1", "x"), b"a")
    consumed = at_hub.consume(up_stream("eu"), "lost", SUBJECTS.reports_of("eu"))
    await (await anext(consumed)).ack()
    await at_hub.delete_consumer(up_stream("eu"), "lost")
    await at_leaf.publish(SUBJECTS.report("eu", "n1", "x"), b"b")
    async with asyncio.timeout(60):
        while (delivery := await anext(consumed)).data != b"b":
            await delivery.ack()
    await consumed.aclose()


async def test_pages_of_the_log_that_are_cut_at_their_bytes_lose_nothing(
    hub: NatsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream_reads, "_PAGE_BYTES", 2_000)
    broker = await Broker.connect(hub.url, "test")
    await Streams(broker, SUBJECTS, ["eu"]).ensure_hub()
    log = EventLog(broker, SUBJECTS)
    names = [str(number) for number in range(60)]
    for name in names:
        await log.append([_logged(name)])
    assert [event.id async for _, event in log.newest_first()] == names[::-1]
    await broker.close()


async def test_a_second_writer_of_the_event_log_is_fenced(hub: NatsServer) -> None:
    broker = await Broker.connect(hub.url, "test")
    await Streams(broker, SUBJECTS, ["eu"]).ensure_hub()
    old, new = EventLog(broker, SUBJECTS), EventLog(broker, SUBJECTS)
    assert [e async for e in old.replay()] == []
    await old.append([_logged("a")])
    assert [e.id async for e in new.replay()] == ["a"]
    await new.append([_logged("b")])
    with pytest.raises(StaleWriter, match="this one stops"):
        await old.append([_logged("c")])
    await new.append([_logged("d")])
    fresh = EventLog(broker, SUBJECTS)
    assert [e.id async for e in fresh.replay()] == ["a", "b", "d"]
    await broker.close()


async def test_an_append_whose_answer_was_lost_is_not_mistaken_for_another_writer(hub: NatsServer) -> None:
    broker = await Broker.connect(hub.url, "test")
    await Streams(broker, SUBJECTS, ["eu"]).ensure_hub()
    first, second = EventLog(broker, SUBJECTS), EventLog(broker, SUBJECTS)
    await first.append([_logged("a")])
    await second.append([_logged("a")])
    await second.append([_logged("b")])
    assert [e.id async for e in EventLog(broker, SUBJECTS).replay()] == ["a", "b"]
    await broker.close()


async def test_a_coordinator_that_comes_back_keeps_collecting_from_its_regions(at_hub: Broker, at_leaf: Broker) -> None:
    await Streams(at_hub, SUBJECTS, ["eu"]).ensure_hub()

    await at_leaf.publish(SUBJECTS.report("eu", "n1", "x"), b"hello")
    async for delivery in at_hub.consume(up_stream("eu"), "again", SUBJECTS.reports_of("eu")):
        assert delivery.data == b"hello"
        break


@pytest.mark.slow
async def test_what_a_frozen_broker_has_not_confirmed_is_shown_to_nobody(hub: NatsServer) -> None:
    broker = await Broker.connect(hub.url, "test")
    await Streams(broker, SUBJECTS, ["eu"]).ensure_hub()
    engine = Engine(broker, SUBJECTS, EventLog(broker, SUBJECTS), Snapshots(broker, SUBJECTS))
    commands: list[Commands] = []
    await engine.take_over(CoordinatorElected(name="one"))
    engine.lead(lambda _, more: commands.append(more))
    running = asyncio.create_task(engine.run())
    hub.freeze()
    submitted = [asyncio.create_task(engine.submit(joined(f"n{i}"))) for i in range(50)]
    await asyncio.to_thread(until, lambda: engine.waits_for != "", "the end of the first try")
    assert not engine.world.nodes and not commands and not any(s.done() for s in submitted)
    hub.thaw()
    await asyncio.gather(*submitted)
    assert len(engine.world.nodes) == len(commands) == 50
    assert await broker.last_sequence(EVENTS) == 51
    running.cancel()
    await broker.close()


async def test_no_bytes_of_a_sender_deafen_who_listens(hub: NatsServer) -> None:
    """Subjects and headers that are no UTF-8, a head that is none, and a header that looks like a poll's status."""
    listener, honest = await Broker.connect(hub.url, "listener"), await Broker.connect(hub.url, "honest")
    await Streams(listener, SUBJECTS, ["eu"]).ensure_hub()
    subject = SUBJECTS.report(HUB_REGION, "n1", "joined").encode()
    heads = [b"NATS/1.0\r\nStatus: 503\r\n\r\n", b"NATS/1.0 \xff\xff\r\n\r\n", b"NATS/1.0\r\n\xff: \xff\r\n\r\n"]
    reader, writer = await asyncio.open_connection("127.0.0.1", hub.port)
    writer.write(b'CONNECT {"verbose":false,"headers":true}\r\n')
    writer.write(b"PUB " + subject[:-2] + b"\xff\xfe 2\r\n{}\r\n")
    writer.write(b"PUB " + subject + b" \xff\xfe 2\r\n{}\r\n")
    for head in heads:
        writer.write(b"HPUB " + subject + b" %d %d\r\n%s{}\r\n" % (len(head), len(head) + 2, head))
    writer.write(b"PING\r\n")
    while await reader.readline() != b"PONG\r\n":
        pass
    await honest.publish(subject.decode(), b"good")
    got = []
    async for delivery in listener.consume(UP, "c", SUBJECTS.reports_of(HUB_REGION)):
        got.append(delivery.data)
        await delivery.ack()
        if delivery.data == b"good":
            break
    assert got == [b"{}"] * 5 + [b"good"]
    assert await listener.last_sequence(UP) == 6
    writer.close()
    await writer.wait_closed()
    for broker in (listener, honest):
        await broker.close()
