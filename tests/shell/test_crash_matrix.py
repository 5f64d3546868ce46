"""The coordinator is killed at every point where it talks to the broker, while a trigger leads to a run, a release and
a roll-out. Whatever the point: its successor ends where an undisturbed one does, and nothing was done twice.

The world outside (nodes, aggregators, whoever fires the trigger) lives on, and does what real ones do.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from fedtide.coordinator.adapters.attesting import Attesting
from fedtide.coordinator.adapters.audit import AuditTrail
from fedtide.coordinator.adapters.director import Director
from fedtide.coordinator.adapters.notices import Notices
from fedtide.coordinator.adapters.presence import Presence
from fedtide.coordinator.adapters.run_models import RunModels
from fedtide.coordinator.adapters.run_services import RunStreams
from fedtide.coordinator.adapters.starting import Starter
from fedtide.coordinator.command_handlers import CommandHandlers
from fedtide.coordinator.commands import LaunchAggregator
from fedtide.coordinator.executor import Executor
from fedtide.coordinator.log.engine import Engine
from fedtide.coordinator.log.event_log import EventLog
from fedtide.coordinator.log.parked import ParkedReports
from fedtide.coordinator.log.reports import Reports
from fedtide.coordinator.log.snapshots import Snapshots
from fedtide.coordinator.log.timers import Alarms
from fedtide.coordinator.rollouts import rollouts
from fedtide.coordinator.runs import runs
from fedtide.coordinator.state import World
from fedtide.fabric.encoding import from_json, to_json
from fedtide.fabric.events.envelope import CoordinatorElected, Event, EventData, ModelProduced, TriggerApplied
from fedtide.fabric.events.envelope import SignalReceived as Signalled
from fedtide.fabric.events.runs import AggregatorStarted, RunCompleted
from fedtide.fabric.nats.jetstream import Received
from fedtide.fabric.nats.streams import leaf_streams
from fedtide.fabric.nats.subjects import CACHE, HUB_REGION, ORDERS, RELEASES, Subjects, up_stream
from fedtide.fabric.nats.transfer import put_blob
from fedtide.fabric.plans.release import Export
from fedtide.fabric.plans.rollout_plan import Desired
from fedtide.fabric.plans.trigger_rule import Signal, TriggerRule
from fedtide.fabric.tensors.blobs import BlobRef
from tests.scenarios.build import APP, closed, collected, joined, opened, phase, received
from tests.shell.conftest import started_nats
from tests.shell.fake_broker import FakeBroker, FakeNats
from tests.shell.killed_broker import KilledBroker

SUBJECTS = Subjects()
NODES = ("n1", "n2")
RULES = (
    {"name": "train", "on": "data.grew", "do": {"kind": "run", "app": APP.model_dump(), "model": "m", "rounds": 1}},
    {
        "name": "ship",
        "on": "dev.fedtide.release.published",
        "do": {"kind": "rollout", "model": "m", "canary": 0.5, "plan": {"bake": {"seconds": 0.0}}},
    },
)
WITHIN_S = 20


class Outside:
    """Nodes that activate what they are told, and aggregators that train it; they survive every coordinator."""

    def __init__(self, nats: FakeNats) -> None:
        self.broker = nats.connect()
        self.launched: Counter[tuple[str, int]] = Counter()
        self.activated: Counter[tuple[str, int]] = Counter()
        self._highest: dict[str, int] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    async def begin(self) -> None:
        for config in leaf_streams(SUBJECTS, "eu"):
            if config["name"] == CACHE:
                await self.broker.ensure_stream(config)
        await self.broker.subscribe(SUBJECTS.down_nodes, self._on_order)
        for node in NODES:
            await self._report("eu", node, joined(node), f"{node}.joined")

    async def _report(self, region: str, who: str, data: EventData, key: str) -> None:
        event = Event.now(f"test/{who}", data, id=key)
        kind = data.kind.replace(".", "-")
        await self.broker.publish(SUBJECTS.report(region, who, kind), to_json(event), message_id=key)

    async def _on_order(self, message: Received) -> None:
        desired, node = from_json(Desired, message.data, "desired"), message.subject.split(".")[-3]
        if desired.counter <= self._highest.get(node, 0):
            return
        self._highest[node] = desired.counter
        self.activated[node, desired.counter] += 1
        confirmed = phase(node, "confirmed", counter=desired.counter, key=desired.rollout)
        await self._report("eu", node, confirmed, f"{node}.{desired.counter}")

    # -- as a launcher ------------------------------------------------------------------------------------

    def prepare(self) -> None: ...

    async def close(self) -> None: ...

    async def stop(self, run: str) -> None: ...

    async def launch(self, command: LaunchAggregator, wanted: Callable[[], bool]) -> None:
        if wanted() and (command.run, command.attempt) not in self.launched:
            self.launched[command.run, command.attempt] += 1
            task = asyncio.create_task(self._aggregate(command.run))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _aggregate(self, run: str) -> None:
        async def keep(content: bytes) -> BlobRef:
            return await put_blob(
                self.broker, lambda d: SUBJECTS.release_upload(run, d), RELEASES, [content], ttl_s=None
            )

        blobs = {name: await keep(name.encode()) for name in ("onnx", "arrays", "smoke")}
        story: list[EventData] = [
            AggregatorStarted(run=run, attempt=1),
            opened(1, *NODES, run=run),
            *(received(1, node).model_copy(update={"run": run}) for node in NODES),
            collected(1).model_copy(update={"run": run, "received": len(NODES)}),
            closed(1).model_copy(update={"run": run}),
            ModelProduced(run=run, model="m", export=Export(), metrics={}, **blobs),
            RunCompleted(run=run, attempt=1),
        ]
        for number, data in enumerate(story):
            await self._report(HUB_REGION, run, data, f"{run}.1.{number}")


async def coordinator(broker: FakeBroker, outside: Outside, ready: asyncio.Future[Engine]) -> None:
    """What `fedtide.coordinator.service` assembles, without the API."""

    async def leads() -> None:
        return

    engine = Engine(broker, SUBJECTS, EventLog(broker, SUBJECTS), Snapshots(broker, SUBJECTS))
    await engine.load()
    async with asyncio.TaskGroup() as group:
        await engine.take_over(CoordinatorElected(name="one"))
        presence = Presence(broker, SUBJECTS, engine, group)
        alarms, starter = Alarms(engine, group), Starter(engine, RunModels(broker, SUBJECTS))
        handlers = CommandHandlers(
            broker,
            SUBJECTS,
            engine,
            outside,
            starter,
            presence,
            alarms,
            None,
            RunStreams(broker, SUBJECTS, ["eu"]),
            Notices({}),
            director := Director(engine, None),
            Attesting(broker, SUBJECTS, engine, director, by_people=True),
            AuditTrail(broker, SUBJECTS),
        )
        group.create_task(engine.run())
        engine.lead(Executor(handlers.handle, group).start)
        reports = Reports(broker, SUBJECTS, engine, ParkedReports(broker, SUBJECTS), ["eu"])
        group.create_task(reports.listen(leads))
        ready.set_result(engine)


async def fire(engine: Engine) -> None:
    """As whoever applies rules and sends an event does it: again, until it is accepted."""
    for rule in RULES:
        await engine.submit(TriggerApplied(rule=TriggerRule.model_validate(rule)), id=f"rule.{rule['name']}")
    signal = Signal(id="once", type="data.grew", fields={})
    await engine.submit(Signalled(signal=signal), id=f"signal.{signal.id}")


def is_over(world: World) -> bool:
    ended = [r for r in world.rollouts.values() if isinstance(r, rollouts.Completed) and r.settled == frozenset(NODES)]
    cleaned = [r for r in world.runs.values() if isinstance(r, runs.Ended) and r.cleaned]
    return len(ended) == 1 and len(cleaned) == 1 and set(world.serving.get("m", ())) == set(NODES)


async def until_over(engine: Engine) -> None:
    with engine.watch() as changed:
        while not is_over(engine.world):
            await changed()


async def lives(broker: KilledBroker | FakeBroker, outside: Outside, *, until: Callable[[Engine], Any]) -> Engine:
    """One coordinator, from its start to `until`, or to its death."""
    ready: asyncio.Future[Engine] = asyncio.get_running_loop().create_future()
    process = asyncio.create_task(coordinator(broker, outside, ready))
    work: set[asyncio.Task[Any]] = {process}
    if isinstance(broker, KilledBroker):
        work.add(asyncio.create_task(broker.killed.wait()))

    async def goal() -> None:
        engine = await ready
        await fire(engine)
        await until(engine)

    work.add(asyncio.create_task(goal()))
    done, _ = await asyncio.wait(work, timeout=WITHIN_S, return_when=asyncio.FIRST_COMPLETED)
    for task in work:
        task.cancel()
    await asyncio.gather(*work, return_exceptions=True)
    await broker.close()
    assert done, "it did not come so far in time"
    for task in done:
        if not task.cancelled() and task.exception() is not None:
            task.result()
    return ready.result() if ready.done() and not ready.cancelled() else None  # type: ignore[return-value]


async def story(nats: FakeNats, kill_at: int, *, before: bool) -> int:
    """The whole story with one death; returns how many calls the first coordinator made."""
    outside = Outside(nats)
    await outside.begin()
    first = KilledBroker(nats, kill_at, before=before)
    await lives(first, outside, until=until_over)
    assert first.killed.is_set() or first.calls < kill_at
    engine = await lives(nats.connect(), outside, until=until_over)
    world = engine.world
    assert outside.launched == {(run, 1): 1 for run in world.runs}, "an attempt was started twice"
    assert outside.activated == {(node, 1): 1 for node in NODES}, "a node was told twice"
    (release,) = world.models["m"].releases
    assert dict(world.serving["m"]) == dict.fromkeys(NODES, release.ref)
    assert not engine.left_out and not await outside.broker.subjects_of("PARKED", SUBJECTS.all_parked)
    assert (await outside.broker.backlog(up_stream("eu"), "coordinator"))[0] == 0
    assert [c for commands in world.pending_commands() for c in commands] == []
    for node in NODES:
        stored = await outside.broker.last(ORDERS, SUBJECTS.desired("eu", node, "m"))
        assert stored is not None and from_json(Desired, stored.data, "desired").release == release.ref
    await outside.broker.close()
    return first.calls


NEVER = 10**9


async def test_the_story_without_a_death(nats: FakeNats) -> None:
    assert await story(nats, NEVER, before=True) > 50


@pytest.mark.parametrize("before", [True, False], ids=["before the call", "after the call"])
async def test_a_coordinator_that_dies_at_any_call_has_a_successor_that_ends_the_same(before: bool) -> None:
    calls = await story(await started_nats(), NEVER, before=before)
    for kill_at in range(1, calls + 1):
        try:
            await story(await started_nats(), kill_at, before=before)
        except AssertionError as exc:
            exc.add_note(f"killed at call {kill_at}")
            raise
