"""An aggregator is killed at every point where it talks to the broker: no node trains twice, no reply counts twice."""

from __future__ import annotations

import asyncio
import queue
import time
from collections import Counter
from pathlib import Path
from typing import Any, NoReturn

import pytest

from fedtide.aggregation.config import WorkerConfig
from fedtide.aggregation.folding.in_flight import Arrived, Inbox, Node
from fedtide.aggregation.link.run_link import RunLink
from fedtide.coordinator.adapters.director import Director
from fedtide.coordinator.adapters.run_services import RunServices, RunStreams
from fedtide.coordinator.log.engine import Engine
from fedtide.coordinator.log.event_log import EventLog
from fedtide.coordinator.log.snapshots import Snapshots
from fedtide.fabric.encoding import from_json, to_json
from fedtide.fabric.events.runs import AggregatorExited, AggregatorStarted
from fedtide.fabric.messages.run_questions import (
    BacklogQuestion,
    Cohort,
    Member,
    Purge,
    Purged,
    RepliesReady,
    RepliesWanted,
    ReplyBacklog,
)
from fedtide.fabric.messages.tasks import Reply, Task, WireMessage
from fedtide.fabric.nats.jetstream import Received
from fedtide.fabric.nats.subjects import RunAsks, Subjects, parse_as, reply_consumer, up_stream
from fedtide.fabric.plans.run_spec import RunSpec
from tests.scenarios.build import APP, Story, apply, requested
from tests.shell.conftest import started_nats
from tests.shell.fake_broker import FakeBroker, FakeNats
from tests.shell.killed_broker import KilledBroker

SUBJECTS = Subjects()
NODES = tuple(Node.of(f"n{i}", "eu") for i in (1, 2, 3))
ROUNDS = 2
NEVER = 10**9
MESSAGE = WireMessage(
    run_id=1, message_id="t", src_node_id=1, dst_node_id=2, created_at=0.0, ttl=1.0, message_type="train", content={}
)


class Outside:
    """The coordinator's answers, nodes that train what they are told, and the checkpoint: they survive."""

    def __init__(self, nats: FakeNats) -> None:
        self.broker = nats.connect()
        self.trained: Counter[str] = Counter()
        self.rounds: list[Counter[str]] = []
        """What each round that has a checkpoint has counted."""

    async def begin(self) -> None:
        await self.broker.answer(SUBJECTS.asked_by_run("run-1", "*"), self._on_question)
        await self.broker.subscribe(SUBJECTS.down_nodes, self._on_task)

    async def _on_question(self, message: Received) -> tuple[bytes, dict[str, str]]:
        streams = RunStreams(self.broker, SUBJECTS, ["eu"])
        match parse_as(RunAsks, message.subject).verb:
            case "cohort":
                members = [Member(name=n.name, region=n.region) for n in NODES]
                return to_json(Cohort(nodes=members, online=[n.name for n in NODES])), {}
            case "backlog":
                return to_json(await streams.backlog("run-1")), {}
            case "replies":
                await streams.take_over_replies("run-1")
                return to_json(RepliesReady()), {}
            case _:
                return to_json(await streams.purge("run-1", from_json(Purge, message.data, "purge"))), {}

    async def _on_task(self, message: Received) -> None:
        task, node = from_json(Task, message.data, "task"), message.subject.split(".")[-4]
        self.trained[task.task] += 1
        reply = Reply(task=task.task, run="run-1", node=node, seconds=0.1, message=MESSAGE)
        subject = SUBJECTS.reply("eu", node, "run-1", task.task)
        await self.broker.publish(subject, to_json(reply), message_id=f"reply.{task.task}")


def _end(code: int) -> NoReturn:
    raise AssertionError(f"the aggregator ended itself with {code}")


async def _arrived(inbox: Inbox) -> Arrived:
    """As Flower's thread waits for it, without a thread."""
    while True:
        try:
            found = inbox.get_nowait()
        except queue.Empty:
            await asyncio.sleep(0)
            continue
        assert isinstance(found, Arrived)
        return found


def _task(name: str) -> Task:
    return Task(task=name, run="run-1", app=APP, run_config={}, message=MESSAGE, expires_at=time.time() + 600)


async def aggregator(broker: FakeBroker, outside: Outside, attempt: int, folder: Path) -> None:
    """Rounds as the driver does them: send, count, checkpoint, and only then close."""
    fields: dict[str, Any] = {"run": "run-1", "attempt": attempt, "nats_url": "nats://127.0.0.1:1", "regions": ["eu"]}
    link = RunLink(WorkerConfig.model_validate({**fields, "spec": RunSpec(app=APP), "work_dir": folder}), _end)
    await link.start(broker)
    try:
        while len(outside.rounds) < ROUNDS:
            inbox: Inbox = queue.SimpleQueue()
            number = len(outside.rounds) + 1
            for node in NODES:
                await link.send(_task(f"run-1-r{number}-train-{node.name}"), node, inbox)
            await link.look_for_absent()
            arrived = [await _arrived(inbox) for _ in NODES]
            assert all(each.reply is not None for each in arrived), [each.lost for each in arrived]
            counted = Counter(each.task for each in arrived)
            outside.rounds.append(counted)  # the checkpoint, which is stored before replies are acknowledged
            assert await link.close_round(set(counted), carries=False) == []
    finally:
        await link.stop_listening()


async def story(kill_at: int, folder: Path, *, before: bool) -> int:
    """Two rounds with one death; returns how many calls the first aggregator made."""
    nats = await started_nats()
    outside = Outside(nats)
    await outside.begin()
    first = KilledBroker(nats, kill_at, before=before)
    running = asyncio.create_task(aggregator(first, outside, 1, folder))
    killed = asyncio.create_task(first.killed.wait())
    done, _ = await asyncio.wait({running, killed}, timeout=20, return_when=asyncio.FIRST_COMPLETED)
    assert done, "it did not come so far in time"
    if running in done:
        running.result()
    for task in (running, killed):
        task.cancel()
    await asyncio.gather(running, killed, return_exceptions=True)
    await first.close()
    second = nats.connect()
    async with asyncio.timeout(20):
        await aggregator(second, outside, 2, folder)
    tasks = [f"run-1-r{number}-train-{node.name}" for number in range(1, ROUNDS + 1) for node in NODES]
    assert outside.trained == Counter(tasks), "a node trained twice, or not at all"
    assert sum(outside.rounds, Counter()) == Counter(tasks), "a reply counted twice, or not at all"
    if not first.killed.is_set():
        assert await second.backlog(up_stream("eu"), reply_consumer("run-1")) == (0, 0)
    for broker in (second, outside.broker):
        await broker.close()
    return first.calls


async def test_an_attempt_that_was_replaced_deletes_nothing_and_learns_that_it_must_end() -> None:
    nats = await started_nats()
    broker = nats.connect()
    engine = Engine(broker, SUBJECTS, EventLog(broker, SUBJECTS), Snapshots(broker, SUBJECTS))
    for data in (requested(), AggregatorStarted(run="run-1", attempt=1)):
        apply(engine.world, Story().event(data))
    apply(engine.world, Story().event(AggregatorExited(run="run-1", attempt=1, code=-9, reason="killed")))
    services = RunServices(broker, SUBJECTS, engine, RunStreams(broker, SUBJECTS, ["eu"]), Director(engine, None))
    await services.listen()
    chunk = f"{SUBJECTS.update_blob('eu', 'n1', 'run-1', 'a' * 64)}.0"
    await broker.publish(chunk, b"update")
    ask = lambda verb, question: broker.ask(SUBJECTS.asked_by_run("run-1", verb), to_json(question))  # noqa: E731
    old = await ask("purge", Purge(attempt=1, updates=None))
    assert from_json(Purged, old, "purged").superseded
    assert from_json(RepliesReady, await ask("replies", RepliesWanted(attempt=1)), "r").superseded
    assert from_json(ReplyBacklog, await ask("backlog", BacklogQuestion(attempt=1)), "b").superseded
    assert await broker.last(up_stream("eu"), chunk) is not None
    assert not from_json(Purged, await ask("purge", Purge(attempt=2, updates=None)), "purged").superseded
    assert await broker.last(up_stream("eu"), chunk) is None
    await broker.close()


@pytest.mark.parametrize("before", [True, False], ids=["before the call", "after the call"])
async def test_an_aggregator_that_dies_at_any_call_has_a_successor_that_counts_each_reply_once(
    tmp_path: Path, before: bool
) -> None:
    calls = await story(NEVER, tmp_path, before=before)
    assert calls > 5
    for kill_at in range(1, calls + 1):
        try:
            await story(kill_at, tmp_path, before=before)
        except AssertionError as exc:
            exc.add_note(f"killed at call {kill_at}")
            raise
