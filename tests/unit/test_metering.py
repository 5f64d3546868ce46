"""What processes have used, against what the kernel says of them."""

from __future__ import annotations

import asyncio
import json
import resource
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from fedtide.coordinator.adapters import metering as adapter
from fedtide.coordinator.adapters.metering import Metering
from fedtide.coordinator.adapters.server_usage import ServerUsage
from fedtide.coordinator.fleet.fleet import Node
from fedtide.coordinator.state import World
from fedtide.edge_agent.tasks.node_meter import NodeMeter
from fedtide.fabric.messages.heartbeat import Capabilities, Heartbeat
from fedtide.fabric.messages.usage import MOST, Usage
from fedtide.fabric.nats.subjects import COLLECTOR, FOLD_WORKER
from fedtide.fabric.process import metering
from fedtide.fabric.process.metering import Meter
from tests.scenarios.build import START

BUSY = """
import os, sys, time
if os.fork() == 0:
    while time.process_time() < 0.3: pass
    os._exit(0)
memory = bytearray(b"x") * 50_000_000
while time.process_time() < 0.3: pass
os.wait()
print("done", flush=True)
sys.stdin.read()
"""


def _children_s() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def test_a_child_counts_with_what_it_has_started_while_it_runs_and_once_when_it_has_ended() -> None:
    now = [0.0]
    meter = Meter("children", clock=lambda: now[0])
    before = meter.mark().cpu_us
    assert before == pytest.approx(1e6 * _children_s(), abs=50_000)
    reaped = _children_s()
    with subprocess.Popen([sys.executable, "-c", BUSY], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.readline()
        now[0] = 20.0
        while_running = meter.mark()
        assert 500_000 <= while_running.cpu_us < 2_000_000
        assert while_running.memory_kb_s >= 20 * 50_000 / 2, "50 MB that it got somewhere within 20 s"
    after = meter.mark()
    used = 1e6 * (_children_s() - reaped)
    assert while_running.cpu_us + after.cpu_us == pytest.approx(used, abs=60_000), "the kernel counts in 10 ms"


def test_this_process_and_one_that_helps_it() -> None:
    with subprocess.Popen([sys.executable, "-c", BUSY], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.readline()
        own = resource.getrusage(resource.RUSAGE_SELF)
        alone, helped = Meter("self").mark().cpu_us, Meter("self", lambda: [child.pid]).mark().cpu_us
    assert alone == pytest.approx(1e6 * (own.ru_utime + own.ru_stime), abs=50_000)
    assert 250_000 <= helped - alone < 600_000, "what the helper has started reports for itself"


def test_gpus_are_counted_for_the_time_that_they_are_held(monkeypatch: pytest.MonkeyPatch) -> None:
    now, held = [0.0], [2]
    monkeypatch.setattr(metering, "held_gpus", lambda pids: held[0])
    meter = Meter("self", clock=lambda: now[0])
    meter.mark()
    now[0] = 60.0
    assert meter.mark().gpu_us == 2 * 60 * 10**6
    held[0], now[0] = 0, 120.0
    meter.mark()
    now[0] = 180.0
    assert meter.mark().gpu_us == 0


def test_without_nvidias_library_no_gpu_is_held() -> None:
    assert metering.held_gpus([1]) == 0


def test_what_the_trainer_uses_between_tasks_is_the_nodes_and_a_cancelled_task_is_wasted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    used = iter(range(1, 100))

    def mark(meter: Meter) -> metering.Used:
        return metering.Used(next(used) if meter._scope == "children" else 0, 0, 0)

    monkeypatch.setattr(Meter, "mark", mark)
    meter = NodeMeter(lambda: (0, 0))
    meter.task_begins()  # 1: idle
    assert meter.of_task() == Usage(cpu_us=2)
    meter.task_ends()
    meter.task_begins()  # 3: idle
    meter.task_was_cancelled()  # 4: wasted
    assert meter.totals() == (Usage(cpu_us=4), Usage(cpu_us=4)), "a task is under way: what it has used is its own"
    meter.task_ends()
    assert meter.totals() == (Usage(cpu_us=4 + 5), Usage(cpu_us=4))
    meter.task_begins(Usage(cpu_us=100))  # 6: idle
    assert meter.of_task() == Usage(cpu_us=100 + 7), "an agent that was stopped has left it"


def test_usages_add_up_and_never_go_below_nothing() -> None:
    a, b = Usage(cpu_us=5, sent_bytes=MOST), Usage(cpu_us=7, sent_bytes=1)
    assert a + b == Usage(cpu_us=12, sent_bytes=MOST)
    assert a - b == Usage(sent_bytes=MOST - 1)
    assert not Usage()
    assert b


@pytest.fixture
def engine() -> SimpleNamespace:
    world = World()
    world.nodes["n"] = node()
    return SimpleNamespace(world=world)


def node(pool: str = "big/box") -> Node:
    can = Capabilities(cpus=1, memory_bytes=1, disk_free_bytes=1, python="3", labels={"pool": pool})
    return Node("n", "eu", can, True, START)


def beat(cpu_us: int, boot: str = "b1", uptime_s: float | None = 0.0, **more: int) -> Heartbeat:
    return Heartbeat(used=Usage(cpu_us=cpu_us), boot=boot, uptime_s=uptime_s, **more)


def counted(meter: Metering) -> dict[str, int]:
    items = [i for i in meter.unlogged() if i.phase in ("idle", "serve")]
    assert {i.pool for i in items} <= {"big-box"}, "no slash: it is part of a line's key"
    return {i.phase: i.usage.cpu_us for i in items}


def test_heartbeats_tell_totals_so_lost_ones_restarts_and_fail_overs_cost_nothing(
    tmp_path: Path, engine: SimpleNamespace
) -> None:
    file = tmp_path / "metering.json"
    first = Metering(engine, dict, tuple, file)
    first.heard(node(), beat(100))
    first.heard(node(), beat(700))
    first.heard(node(), beat(900, inferences=3))
    assert counted(first) == {"idle": 700, "serve": 200}
    first.heard(node(), beat(50, boot="b2", inferences=1))
    assert counted(first) == {"idle": 700, "serve": 250}, "a new start begins at nothing"
    first.save()
    second = Metering(engine, dict, tuple, file)
    second.begin()
    second.heard(node(), beat(60, boot="b2", inferences=1))
    assert counted(second) == {"idle": 710, "serve": 250}


def test_of_an_agent_that_nobody_knows_is_not_booked_what_it_used_before(
    tmp_path: Path, engine: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [100.0]
    monkeypatch.setattr(adapter, "monotonic", lambda: now[0])
    meter = Metering(engine, lambda: {"": 5_000_000}, tuple, tmp_path / "metering.json")
    meter.heard(node(), beat(10**9, uptime_s=10**6))
    meter.heard(node(), beat(10**9 + 7, uptime_s=10**6 + 5))
    assert counted(meter) == {"idle": 7}
    now[0] += 10.0
    assert sum(i.stored_kb_s for i in meter.unlogged()) == 50_000, "what is stored costs by time"


def test_workers_of_a_region_tell_totals_as_well(tmp_path: Path, engine: SimpleNamespace) -> None:
    file = tmp_path / "metering.json"
    first = Metering(engine, dict, tuple, file)
    for told in (100, 300):
        first.heard_worker("eu", COLLECTOR, beat(told))
    first.heard_worker("us", FOLD_WORKER, beat(50))
    first.heard_worker("us", FOLD_WORKER, beat(50))
    first.save()
    second = Metering(engine, dict, tuple, file)
    second.begin()
    second.heard_worker("eu", COLLECTOR, beat(350))
    booked = {(i.region, i.pool, i.phase): i.usage.cpu_us for i in second.unlogged() if i.region}
    assert booked == {("eu", "collectors", "coordinate"): 350, ("us", "aggregators", "aggregate"): 50}


async def test_servers_of_the_hub_tell_shares_of_a_core_and_totals_of_bytes() -> None:
    heard: list[Usage] = []
    now = [0.0]
    usage = ServerUsage(heard.append, clock=lambda: now[0])

    async def tell(at: float, cpu: float, received: int, name: str = "A") -> None:
        now[0] = at
        about = {"mem": 20_000_000, "cpu": cpu, "cores": 2, "received": {"msgs": 1, "bytes": received}}
        body = {"server": {"id": name, "name": "hub"}, "statsz": about}
        await usage.on_statistics(SimpleNamespace(data=json.dumps(body).encode()))

    await tell(0.0, 50.0, 1000)
    await tell(10.0, 50.0, 3000)
    await tell(10.0, 99.0, 3000, name="B")
    assert heard == [Usage(cpu_us=5_000_000, memory_kb_s=200_000, received_bytes=2000)]
    await tell(20.0, 10_000.0, 0)
    assert heard[-1] == Usage(cpu_us=20_000_000, memory_kb_s=200_000), "no more than its cores; counters began anew"
    await tell(1000.0, 50.0, 10)
    assert len(heard) == 2, "of a time in which nobody heard it nothing is known"


def test_what_moves_while_a_node_has_a_task_is_the_tasks() -> None:
    moved = [0, 0]
    meter = NodeMeter(lambda: (moved[0], moved[1]))
    moved[:] = 10, 1
    meter.task_begins()
    moved[:] = 510, 31
    assert meter.totals()[0].received_bytes == 10
    task = meter.of_task()
    assert (task.received_bytes, task.sent_bytes) == (500, 30)
    meter.task_ends()
    moved[:] = 3, 2  # connected anew: the counters began at nothing
    assert meter.totals()[0].sent_bytes == 1


def test_who_tells_often_or_as_a_new_start_each_time_cannot_have_used_more_than_the_time_allows(
    tmp_path: Path, engine: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [100.0]
    monkeypatch.setattr(adapter, "monotonic", lambda: now[0])
    meter = Metering(engine, dict, tuple, tmp_path / "metering.json")
    for number in range(2000):
        now[0] += 0.001
        lie = Usage(cpu_us=MOST, received_bytes=MOST)
        meter.heard_worker("eu", COLLECTOR, Heartbeat(used=lie, boot=f"b{number}", uptime_s=0.0))
        meter.heard(node(), Heartbeat(used=lie, inferences=MOST, boot=f"b{number}", uptime_s=0.0))
    booked = {i.pool: i for i in meter.unlogged()}
    assert booked["collectors"].usage.cpu_us <= 64 * (2 + adapter.SLACK_S) * 1e6
    assert booked["big-box"].usage.cpu_us <= (2 + adapter.SLACK_S) * 1e6, "it has one core"
    assert booked["big-box"].inferences <= (2 + adapter.SLACK_S) * adapter.MOST_INFERENCES_A_SECOND
    meter.heard_worker("a/b", COLLECTOR, beat(5))
    assert all("/" not in i.region for i in meter.unlogged())


def test_a_machine_is_not_believed_to_be_larger_than_there_are() -> None:
    assert Usage(cpu_us=MOST).at_most(1.0, 2**40, 2**60) == Usage(cpu_us=4096 * 10**6)


async def test_what_could_not_be_logged_is_kept_also_when_it_is_stopped_meanwhile(
    tmp_path: Path, engine: SimpleNamespace
) -> None:
    waits = asyncio.Event()

    async def submit(_: object) -> None:
        waits.set()
        await asyncio.Event().wait()

    engine.submit, engine.world.members = submit, list
    meter = Metering(engine, dict, tuple, tmp_path / "metering.json")
    meter.heard(node(), beat(100))
    logging_it = asyncio.create_task(meter._log())
    await waits.wait()
    logging_it.cancel()
    await asyncio.gather(logging_it, return_exceptions=True)
    assert counted(meter) == {"idle": 100}


def test_a_damaged_file_is_left_and_counting_begins_anew(tmp_path: Path, engine: SimpleNamespace) -> None:
    file = tmp_path / "metering.json"
    file.write_text("{")
    meter = Metering(engine, dict, tuple, file)
    meter.heard(node(), beat(5))
    assert counted(meter) == {"idle": 5}


def test_what_another_process_has_logged_since_is_not_booked_again(tmp_path: Path, engine: SimpleNamespace) -> None:
    file = tmp_path / "metering.json"
    first = Metering(engine, dict, tuple, file)
    first.heard(node(), beat(100))
    first.save()
    engine.world.metered = "evt-of-another"
    second = Metering(engine, dict, tuple, file)
    second.begin()
    second.heard(node(), beat(1000, uptime_s=10**6))
    assert counted(second) == {}, "up to here the other one has logged it, or nobody knows"


def test_a_node_that_lies_or_renames_itself_cannot_blow_up_the_ledger(tmp_path: Path, engine: SimpleNamespace) -> None:
    meter = Metering(engine, dict, tuple, tmp_path / "metering.json")
    for number in range(200):
        told = Heartbeat(used=Usage(cpu_us=MOST), inferences=MOST, boot=f"b{number}", uptime_s=0.0)
        meter.heard(node(f"pool-{number}"), told)
    items = [i for i in meter.unlogged() if i.phase == "serve"]
    assert len(items) <= 33
    assert sum(i.usage.cpu_us for i in items) < 200 * 60 * 10**6
    assert sum(i.inferences for i in items) < MOST
