"""The loop around the reducers, on a broker in memory: log, order, duplicates, fencing, catching up."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from fedtide.coordinator.commands import Commands, LaunchAggregator
from fedtide.coordinator.log.engine import Engine
from fedtide.coordinator.log.event_log import EventLog
from fedtide.coordinator.log.snapshots import Snapshots
from fedtide.fabric.encoding import to_json
from fedtide.fabric.errors import InvalidTransition, StaleWriter
from fedtide.fabric.events.envelope import CoordinatorElected, Event, EventData, NodeOnline
from fedtide.fabric.events.runs import RunCancelRequested
from fedtide.fabric.nats.subjects import EVENTS, UP, Subjects
from tests.scenarios.build import joined, requested
from tests.shell.fake_broker import FakeBroker, FakeNats

SUBJECTS = Subjects()
ELECTED = CoordinatorElected(name="one")


class Running:
    """An engine whose commands are kept instead of carried out."""

    def __init__(self, broker: FakeBroker) -> None:
        self.commands: list[Commands] = []
        snapshots = Snapshots(broker, SUBJECTS)
        self.engine = Engine(broker, SUBJECTS, EventLog(broker, SUBJECTS), snapshots, self.commands.append)
        self.failed: asyncio.Task[None] | None = None

    def launched(self) -> list[str]:
        return [c.run for commands in self.commands for c in commands if isinstance(c, LaunchAggregator)]


@pytest.fixture
async def running(broker: FakeBroker) -> AsyncIterator[Running]:
    """A leading engine."""
    it = Running(broker)
    await it.engine.take_over(ELECTED)
    task = asyncio.create_task(it.engine.run())
    yield it
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def reported(broker: FakeBroker, data: EventData, node: str) -> None:
    """As an agent does it."""
    event = Event.now(f"node/{node}", data)
    await broker.publish(SUBJECTS.report("eu", node, "joined"), to_json(event), message_id=event.id)


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
    with pytest.raises(StaleWriter):
        # The first engine's own loop ended with it; here the same event through the same log.
        await running.engine._handle(Event.now("coordinator", requested()))
    submitted.cancel()
    await successor.engine.catch_up()
    assert not successor.engine.world.runs


async def test_a_successor_asks_again_for_what_the_state_still_wants(nats: FakeNats, running: Running) -> None:
    await running.engine.submit(requested())
    successor = Running(nats.connect())
    await successor.engine.take_over(CoordinatorElected(name="two"))
    assert successor.launched() == []
    successor.engine.lead()
    assert successor.launched() == ["run-1"]


async def test_a_report_is_acknowledged_once_it_is_logged(running: Running, broker: FakeBroker) -> None:
    async def leads() -> None:
        return

    listening = asyncio.create_task(running.engine.listen(leads))
    await reported(broker, joined("n1"), "n1")
    with running.engine.watch() as changed:
        while "n1" not in running.engine.world.nodes:
            await changed()
    await asyncio.sleep(0)
    assert await broker.backlog(UP, "coordinator") == (0, 0)
    listening.cancel()


async def test_a_report_in_somebody_elses_name_is_refused_and_not_asked_for_again(
    running: Running, broker: FakeBroker
) -> None:
    async def leads() -> None:
        return

    listening = asyncio.create_task(running.engine.listen(leads))
    await reported(broker, joined("victim"), "hostile")
    await reported(broker, joined("n1"), "n1")
    with running.engine.watch() as changed:
        while "n1" not in running.engine.world.nodes:
            await changed()
    assert "victim" not in running.engine.world.nodes
    listening.cancel()


async def test_a_standby_knows_what_the_leader_logged(nats: FakeNats, running: Running) -> None:
    standby = Running(nats.connect())
    leading: asyncio.Task[None] = asyncio.create_task(asyncio.Event().wait())
    following = asyncio.create_task(standby.engine.follow(leading))
    await running.engine.submit(joined("n1"))
    await running.engine.submit(NodeOnline(node="n1"))
    for _ in range(100):
        await asyncio.sleep(0)
    assert standby.engine.world.nodes["n1"].online and standby.commands == []
    leading.cancel()
    await following


async def test_an_event_on_which_a_reducer_fails_is_refused_and_leaves_nothing(
    running: Running, broker: FakeBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    await running.engine.submit(requested())

    def fails(event: Event, nodes: object) -> list[object]:
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
