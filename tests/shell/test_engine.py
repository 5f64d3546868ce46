"""The loop around the reducers, on a broker in memory: log, order, duplicates, fencing, catching up."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import pytest

from fedtide.coordinator import reducers
from fedtide.coordinator.commands import Commands, LaunchAggregator
from fedtide.coordinator.log import snapshot_codec
from fedtide.coordinator.log.engine import Engine
from fedtide.coordinator.log.event_log import EventLog
from fedtide.coordinator.log.parked import ParkedReports
from fedtide.coordinator.log.reports import Reports
from fedtide.coordinator.log.snapshot_codec import Snapshot
from fedtide.coordinator.log.snapshots import Snapshots
from fedtide.fabric.encoding import to_json
from fedtide.fabric.errors import BrokerUnavailable, InvalidTransition, LogLost, MalformedMessage, StaleWriter, TooLarge
from fedtide.fabric.events.envelope import CoordinatorElected, Event, EventData, NodeJoined, NodeOnline
from fedtide.fabric.events.runs import RunCancelRequested
from fedtide.fabric.nats.jetstream import Received
from fedtide.fabric.nats.subjects import EVENTS, UP, Subjects
from tests.scenarios.build import joined, measured, requested, rollout, wave
from tests.shell.fake_broker import FakeBroker, FakeNats

SUBJECTS = Subjects()
ELECTED = CoordinatorElected(name="one")


class Running:
    """An engine whose commands are kept instead of carried out."""

    def __init__(self, broker: FakeBroker) -> None:
        self.commands: list[Commands] = []
        self.engine = Engine(broker, SUBJECTS, EventLog(broker, SUBJECTS), Snapshots(broker, SUBJECTS))
        self.reports = Reports(broker, SUBJECTS, self.engine, ParkedReports(broker, SUBJECTS), ["eu"])

    def lead(self) -> None:
        self.engine.lead(lambda _, commands: self.commands.append(commands))

    def launched(self) -> list[str]:
        return [c.run for commands in self.commands for c in commands if isinstance(c, LaunchAggregator)]


@pytest.fixture
async def running(broker: FakeBroker) -> AsyncIterator[Running]:
    """A leading engine."""
    it = Running(broker)
    await it.engine.take_over(ELECTED)
    it.lead()
    task = asyncio.create_task(it.engine.run())
    yield it
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


@asynccontextmanager
async def listening(running: Running) -> AsyncIterator[None]:
    """The engine takes reports."""

    async def leads() -> None:
        return

    task = asyncio.create_task(running.reports.listen(leads))
    yield
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def reported(broker: FakeBroker, data: EventData, node: str, **fields: object) -> None:
    """As an agent does it."""
    event = Event.now(f"node/{node}", data).model_copy(update=fields)
    await broker.publish(SUBJECTS.report("eu", node, "joined"), to_json(event), message_id=event.id[:50])


async def known(running: Running, node: str) -> None:
    with running.engine.watch() as changed:
        while node not in running.engine.world.nodes:
            await changed()


async def settled() -> None:
    """Let every task go on until it waits for something else than its turn."""
    for _ in range(100):
        await asyncio.sleep(0)


async def test_an_event_is_in_the_log_before_its_commands_start(running: Running, broker: FakeBroker) -> None:
    await running.engine.submit(requested())
    stored = await broker.read_from(EVENTS, 1)
    assert [m.subject.rpartition(".")[2] for m in stored] == ["elected", "requested"]
    assert running.launched() == ["run-1"]


async def test_the_same_event_twice_is_one(running: Running, broker: FakeBroker) -> None:
    for _ in range(2):
        await running.engine.submit(requested(), id="once")
    assert await broker.last_sequence(EVENTS) == 2 and running.launched() == ["run-1"]


async def test_what_the_state_does_not_allow_is_not_logged(running: Running, broker: FakeBroker) -> None:
    with pytest.raises(InvalidTransition):
        await running.engine.submit(RunCancelRequested(run="no-such-run", reason="because"))
    assert await broker.last_sequence(EVENTS) == 1 and running.engine.refused == 1


@pytest.mark.looptime
async def test_while_the_broker_is_away_an_event_waits_and_its_reason_is_told(
    running: Running, nats: FakeNats, broker: FakeBroker
) -> None:
    nats.down = True
    submitted = asyncio.create_task(running.engine.submit(requested()))
    await asyncio.sleep(60)
    assert not submitted.done() and "no answer" in running.engine.waits_for
    nats.down = False
    await submitted
    assert running.engine.waits_for == "" and await broker.last_sequence(EVENTS) == 2


@pytest.mark.looptime
async def test_an_append_whose_confirmation_was_lost_is_not_stored_twice(
    running: Running, nats: FakeNats, broker: FakeBroker
) -> None:
    nats.lose_confirmations = 1
    await running.engine.submit(requested())
    await running.engine.submit(joined("n1"))
    assert await broker.last_sequence(EVENTS) == 3


async def test_a_leader_that_was_replaced_writes_nothing_more(nats: FakeNats, running: Running) -> None:
    successor = Running(nats.connect())
    await successor.engine.take_over(CoordinatorElected(name="two"))
    submitted = asyncio.create_task(running.engine.submit(requested()))
    second = Running(nats.connect())
    second.engine._log = running.engine._log  # its own loop ended with it; here another event through the same log
    running_again = asyncio.create_task(second.engine.run())
    waiting = asyncio.create_task(second.engine.submit(requested()))
    with pytest.raises(StaleWriter):
        await running_again
    for each in (submitted, waiting):
        each.cancel()
    assert not running.engine.world.runs
    await successor.engine.catch_up()
    assert not successor.engine.world.runs


async def test_a_successor_asks_again_for_what_the_state_still_wants(nats: FakeNats, running: Running) -> None:
    await running.engine.submit(requested())
    successor = Running(nats.connect())
    await successor.engine.take_over(CoordinatorElected(name="two"))
    assert successor.launched() == []
    successor.lead()
    assert successor.launched() == ["run-1"]


async def test_a_report_is_acknowledged_once_it_is_logged(running: Running, broker: FakeBroker) -> None:
    async with listening(running):
        await reported(broker, joined("n1"), "n1")
        await known(running, "n1")
        await settled()
        assert await broker.backlog(UP, "coordinator") == (0, 0)


@pytest.mark.looptime
async def test_a_report_whose_append_hangs_is_neither_shown_nor_acknowledged(
    running: Running, nats: FakeNats, broker: FakeBroker
) -> None:
    async with listening(running):
        await settled()
        await reported(broker, joined("n1"), "n1")
        nats.down = True
        await asyncio.sleep(60)
        assert "n1" not in running.engine.world.nodes and running.commands == []
        assert "no answer" in running.engine.waits_for
        nats.down = False
        await known(running, "n1")
        await settled()
        assert await broker.backlog(UP, "coordinator") == (0, 0)


@pytest.mark.parametrize(
    ("data", "fields", "reason"),
    [
        (joined("victim"), {}, "victim"),
        (joined("n2"), {"id": "x" * 70_000}, "its id has more than"),
        (joined("n2", samples=10**400), {}, "more than 64 bits"),
        (joined("n2", labels={"a": "b" * 200_000}), {}, "more than 100000 characters"),
        (measured("n2"), {}, "never started"),
    ],
)
async def test_a_report_that_cannot_be_applied_is_parked_and_not_asked_for_again(
    running: Running, broker: FakeBroker, data: EventData, fields: dict[str, object], reason: str
) -> None:
    async with listening(running):
        await reported(broker, data, "n2", **fields)
        await reported(broker, joined("n1"), "n1")
        await known(running, "n1")
        await settled()
        assert set(running.engine.world.nodes) == {"n1"}
        assert await broker.backlog(UP, "coordinator") == (0, 0)
        (parked,) = await running.reports.parked.all()
        assert reason in parked.reason


async def test_a_parked_report_can_be_tried_again_once_it_can_be_applied(running: Running, broker: FakeBroker) -> None:
    async with listening(running):
        await reported(broker, measured("n1"), "n1")
        await settled()
        (parked,) = await running.reports.parked.all()
        with pytest.raises(InvalidTransition, match="never started"):
            await running.reports.retry(parked.id)
        await running.engine.submit(rollout(wave("eu", "n1")))
        await running.reports.retry(parked.id)
        assert running.reports.parked.count == 0 and await running.reports.parked.all() == []


async def test_many_events_are_one_append_and_a_refused_one_costs_the_others_nothing(
    running: Running, broker: FakeBroker
) -> None:
    batches = []
    append = broker.publish_batch

    async def counted(messages: Sequence[tuple[str, bytes]], *, expected_last: int, timeout_s: float = 10.0) -> int:
        batches.append(len(messages))
        return await append(messages, expected_last=expected_last)

    broker.publish_batch = counted
    events = [*(joined(f"n{i}") for i in range(99)), RunCancelRequested(run="none", reason="because")]
    results = await asyncio.gather(*(running.engine.submit(e) for e in events), return_exceptions=True)
    assert [r for r in results if r is not None] == [results[-1]] and isinstance(results[-1], InvalidTransition)
    assert len(running.engine.world.nodes) == 99 and sum(batches) >= 98 and len(batches) <= 2
    assert await broker.last_sequence(EVENTS) == 100


async def test_an_event_that_does_not_fit_the_log_changes_nothing_also_in_a_batch(
    running: Running, broker: FakeBroker
) -> None:
    large = joined("large", labels={f"l{i}": "x" * 90_000 for i in range(13)})
    events = [joined(f"n{i}") for i in range(40)]
    results = await asyncio.gather(*(running.engine.submit(e) for e in [*events, large]), return_exceptions=True)
    assert [r for r in results if r is not None] == [results[-1]] and isinstance(results[-1], TooLarge)
    assert "large" not in running.engine.world.nodes and await broker.last_sequence(EVENTS) == 41


@pytest.mark.looptime
async def test_a_copy_in_the_same_batch_is_told_no_sooner_than_the_first_one(
    running: Running, nats: FakeNats, broker: FakeBroker
) -> None:
    nats.down = True
    others = [asyncio.create_task(running.engine.submit(joined(f"n{i}"))) for i in range(40)]
    copies = [asyncio.create_task(running.engine.submit(requested(), id="once")) for _ in range(2)]
    await asyncio.sleep(60)
    assert not any(task.done() for task in [*others, *copies])
    nats.down = False
    await asyncio.gather(*others, *copies)
    assert await broker.last_sequence(EVENTS) == 42


@pytest.mark.looptime
async def test_a_batch_whose_confirmation_was_lost_is_there_once(
    running: Running, nats: FakeNats, broker: FakeBroker
) -> None:
    nats.lose_confirmations = 1
    await asyncio.gather(*(running.engine.submit(joined(f"n{i}")) for i in range(100)))
    assert await broker.last_sequence(EVENTS) == 101 and len(running.engine.world.nodes) == 100


@pytest.mark.looptime
async def test_an_append_that_cannot_look_whether_it_was_stored_is_tried_again(
    running: Running, nats: FakeNats, broker: FakeBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, failures = broker.read_from, 3

    async def away(*arguments: Any, **options: Any) -> list[Received]:
        nonlocal failures
        failures -= 1
        if failures >= 0:
            raise BrokerUnavailable("away again")
        return await read(*arguments, **options)

    monkeypatch.setattr(broker, "read_from", away)
    nats.lose_confirmations = 1
    await running.engine.submit(joined("n1"))
    assert failures == -1 and await broker.last_sequence(EVENTS) == 2


async def test_a_log_that_ends_before_its_snapshot_is_not_led(nats: FakeNats, broker: FakeBroker) -> None:
    first = Running(broker)
    await first.engine.take_over(ELECTED)
    await Snapshots(broker, SUBJECTS).save(Snapshot(7, 7, first.engine.world, []))
    with pytest.raises(LogLost, match="ends at 1, but its snapshot is of event 7"):
        await Running(nats.connect()).engine.load()


@pytest.mark.looptime
async def test_a_take_over_waits_for_a_broker_that_is_away_and_does_not_forget_the_snapshot(
    nats: FakeNats, broker: FakeBroker, running: Running
) -> None:
    await running.engine.submit(joined("n1"))
    kept = Snapshot(2, 2, running.engine.world, [])
    await Snapshots(broker, SUBJECTS).save(kept)
    successor = Running(nats.connect())
    nats.down = True
    coming = asyncio.create_task(successor.engine.load())
    await asyncio.sleep(5)
    assert not coming.done()
    nats.down = False
    await coming
    assert successor.engine.applied == 2, "it starts from the snapshot"
    nats.down = True
    coming = asyncio.create_task(successor.engine.take_over(CoordinatorElected(name="two")))
    await asyncio.sleep(5)
    nats.down = False
    await coming
    assert "n1" in successor.engine.world.nodes


async def test_what_is_no_event_in_the_log_is_left_out_unless_it_must_be_understood(
    nats: FakeNats, broker: FakeBroker, running: Running
) -> None:
    await running.engine.submit(joined("n1"))
    await broker.publish(SUBJECTS.event("node", "joined"), b"\xff{", expected_last=2)
    await broker.publish(SUBJECTS.event("node", "online"), to_json(Event.now("t", NodeOnline(node="n1"))))
    successor = Running(nats.connect())
    await successor.engine.take_over(CoordinatorElected(name="two"))
    assert successor.engine.world.nodes["n1"].online
    ((event, reason),) = successor.engine.left_out.values()
    assert event.id == "unreadable-3" and "event 3 of the log cannot be read" in reason
    kept = Snapshot(9, 9, successor.engine.world, [], None, [(event, reason)])
    assert snapshot_codec.decode(snapshot_codec.encode(kept)).left_out == [(event, reason)]

    newer = {"type": "dev.fedtide.node.moved.v1", "data": {"kind": "node.moved", "must_understand": ["kind"]}}
    await broker.publish(SUBJECTS.event("node", "moved"), json.dumps(newer).encode())
    with pytest.raises(MalformedMessage, match="A newer fedtide has written it"):
        await Running(nats.connect()).engine.catch_up()


async def test_an_event_of_the_log_that_cannot_be_applied_is_left_out_and_told(
    nats: FakeNats, running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    await running.engine.submit(joined("n1"))
    await running.engine.submit(requested())
    successor = Running(nats.connect())

    def fails(_: object, __: object) -> None:
        raise RuntimeError("another version")

    with monkeypatch.context() as broken:
        broken.setitem(reducers.REDUCERS, NodeJoined, fails)
        await successor.engine.take_over(CoordinatorElected(name="two"))
    assert "run-1" in successor.engine.world.runs and not successor.engine.world.nodes
    ((event, reason),) = successor.engine.left_out.values()
    assert event.data == joined("n1") and "another version" in reason
    kept = Snapshot(9, 9, successor.engine.world, [], None, [(event, reason)])
    assert snapshot_codec.decode(snapshot_codec.encode(kept)).left_out == [(event, reason)]


async def test_a_standby_knows_what_the_leader_logged(nats: FakeNats, running: Running) -> None:
    standby = Running(nats.connect())
    leads = asyncio.Event()
    following = asyncio.create_task(standby.engine.follow(leads))
    await running.engine.submit(joined("n1"))
    await running.engine.submit(NodeOnline(node="n1"))
    await settled()
    assert standby.engine.world.nodes["n1"].online and standby.commands == []
    leads.set()
    await following


async def test_an_event_on_which_a_reducer_fails_is_refused_and_leaves_nothing(
    running: Running, broker: FakeBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    await running.engine.submit(requested())

    def fails(event: Event, *_: object) -> list[object]:
        if event.data.kind == "node.joined":
            raise OverflowError("date value out of range")
        return []

    with monkeypatch.context() as broken:
        broken.setattr("fedtide.coordinator.signals.of", fails)
        with pytest.raises(InvalidTransition, match="date value out of range"):
            await running.engine.submit(joined("n1"))
    assert "n1" not in running.engine.world.nodes and await broker.last_sequence(EVENTS) == 2
    await running.engine.submit(joined("n2"))
    assert set(running.engine.world.nodes) == {"n2"} and "run-1" in running.engine.world.runs
