"""Runs under a seeded schedule of faults, each checked against the same run without any.

`python -m tests.faults.campaign --seed N --points K` (what `make faults` calls) prints what was
killed in which state and what was checked; the exit code is the number of points that failed.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import shutil
import signal
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

from fedtide.console import endpoints
from fedtide.fabric.events.envelope import Event
from fedtide.fabric.events.runs import RunRequested
from fedtide.fabric.flower.app_files import bundle
from fedtide.fabric.flower.apps import describe
from fedtide.fabric.ids import flower_int
from fedtide.fabric.messages.views import RunView
from fedtide.fabric.plans.round_policy import RoundPolicy
from fedtide.fabric.plans.run_spec import AppRef
from fedtide.fabric.plans.trigger_rule import StartRun, TriggerRule
from tests.conftest import APPS
from tests.faults.installation_with_faults import Faulty, faulty_installation
from tests.faults.schedule import Point, points

REGIONS = ["eu", "us"]
ROUNDS = 3
CONFIG: dict[str, Any] = {"num-server-rounds": ROUNDS, "delay": 0.4, "size": 300_000, "everyone": True}
STRATEGIES = ("FedAvg", "ours.FedAvg")
"""Flower's own, which lists replies, and ours, which folds them as they come: points take turns."""
POLICY = RoundPolicy(node_grace_s=300, deadline_s=600, min_updates=4)


class Campaign:
    """With one strategy: one undisturbed run, then one run a point."""

    def __init__(self, there: Faulty, seed: int, strategy: str = "FedAvg") -> None:
        self._there = there
        self._seed = seed
        self.strategy = strategy
        self._type = f"faults.{strategy.lower().replace('.', '-')}"
        self._expected = b""
        self._calls: list[float] = []

    async def prepare(self) -> None:
        """Apply the rule by which every run is started, and run once without faults."""
        there, app = self._there, APPS / "mean"
        ref = await there.ask(endpoints.put_bundle(bundle(app)))
        named = there.signed(AppRef(name=describe(app).name, bundle=ref))
        config = {**CONFIG, "strategy": self.strategy}
        do = StartRun(app=named, rounds=ROUNDS, run_config=config, policy=POLICY)
        rule = TriggerRule(name=self._type.replace(".", "-"), on=self._type, policy="queue", do=do)
        await there.ask(endpoints.apply_trigger(rule))
        run = await self._fire("undisturbed")
        view = await there.finished(run)
        assert view.state == "completed", view.reason
        self._expected, self._calls = there.final(run), _calls(view)

    async def _fire(self, key: str) -> str:
        """Send a CloudEvent until it is accepted (twice, as a sender may), and give the run that it started."""
        event_id = f"{self._seed}-{key}-{self.strategy}"
        headers = {"Content-Type": "application/json", "ce-specversion": "1.0", "ce-id": event_id}
        headers |= {"ce-type": self._type, "ce-source": "tests/faults"}
        for _ in range(2):
            await asyncio.to_thread(_post_event, self._there.layout.apis[0], {**headers, **self._there.shown})

        def is_it(event: Event) -> bool:
            return event.data.kind == "run.requested" and event.data.cause.endswith(event_id)

        requested = (await self._there.event(is_it)).data
        assert isinstance(requested, RunRequested)
        return requested.run

    async def point(self, point: Point) -> str:
        """Do one point and check everything; returns what was found, or raises AssertionError."""
        there = self._there
        before = len(there.seen)
        run = await self._fire(str(point.number))
        counted = 0

        def moment(event: Event) -> bool:
            nonlocal counted
            counted += event.data.kind == point.moment and getattr(event.data, "run", "") == run
            return counted >= point.nth

        await there.event(moment)
        await asyncio.sleep(point.delay_s)
        state = (there.seen[-1].data.kind, len(there.seen) - before)
        await self._strike(point)
        view = await there.finished(run)
        await self._check(run, view)
        return f"last event {state[0]} ({state[1]} so far), attempt {view.attempt}"

    async def _strike(self, point: Point) -> None:
        there = self._there
        match point.victim:
            case "link":
                link = there.links[point.how.split()[1]]
                link.cut()
                await asyncio.sleep(point.lasts_s)
                link.restore()
            case "disk":
                node = point.how.split()[1]
                there.fill_disk(node, full=True)
                await asyncio.sleep(point.lasts_s)
                there.fill_disk(node, full=False)
            case "all":
                for child in [*(c.name for c in there.layout.children), "aggregator"]:
                    there.send(child, signal.SIGKILL)
            case victim:
                number = signal.Signals[point.how]
                pid = there.pid(victim)
                if there.send(victim, number) and number == signal.SIGSTOP and pid is not None:
                    await asyncio.sleep(point.lasts_s)
                    os.kill(pid, signal.SIGCONT)

    async def _check(self, run: str, view: RunView) -> None:
        there = self._there
        assert view.state == "completed", view.reason
        assert there.final(run) == self._expected, "the final model differs from that of the undisturbed run"
        assert _calls(view) == self._calls, f"a node trained twice for one task: {_calls(view)}"
        rounds = [r for r in view.rounds if r.round]
        assert [r.round for r in rounds] == list(range(1, ROUNDS + 1))
        for each in rounds:
            for phase, tally in each.phases.items():
                where = f"round {each.round} {phase}"
                # Who is offline when an evaluation begins is not asked; every training waits for all.
                wanted = len(there.layout.nodes) if phase == "train" else tally.asked
                assert len(tally.received) == wanted, f"{where}: {tally}"
                assert not tally.refused, f"{where}: {tally.refused}"
        for node in there.layout.nodes:
            _nobody_trained_what_was_done(there.folder(node), run)
        fired = [e for e in there.seen if e.data.kind == "run.requested" and e.data.run == run]
        assert len({e.id for e in fired}) == 1, "one event started two runs"


def _calls(view: RunView) -> list[float]:
    """How often the nodes had trained in this run after each round: their states count."""
    return [r.metrics["train_calls"] for r in view.rounds if r.round]


def _nobody_trained_what_was_done(folder: Path, run: str) -> None:
    done = {m.name: m.stat().st_mtime for m in (folder / "outbox" / "done").glob(f"{run}-r*-train-*")}
    journal = folder / "work" / run / "journal.txt"
    for line in journal.read_text().splitlines() if journal.exists() else []:  # a node may have had nothing to do
        run_id, number, began, *_ = [*line.split(), "", ""]  # a kill may leave half a line
        if began and int(run_id) == flower_int(run):
            (ended,) = [t for name, t in done.items() if name.startswith(f"{run}-r{number}-")]
            assert float(began) <= ended, f"{folder.name} trained round {number} again after it was acknowledged"


def _post_event(api: str, headers: dict[str, str]) -> None:
    deadline = time.monotonic() + 60
    while True:
        try:
            request = urllib.request.Request(f"{api}/v1/events", b"{}", headers)
            with urllib.request.urlopen(request, timeout=30):
                return
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)  # as a sender of webhooks does: the coordinator may be the victim


async def campaign(seed: int, count: int, home: Path, only: int | None = None) -> int:
    """Do the points of a seed; returns how many failed."""
    failed = 0
    async with faulty_installation(home, REGIONS, 2) as there:
        works = [Campaign(there, seed, strategy) for strategy in STRATEGIES]
        for work in works:
            await work.prepare()
        for point in points(seed, count, REGIONS, list(there.layout.nodes)):
            if only is not None and point.number != only:
                continue
            began = time.monotonic()
            work = works[point.number % len(works)]
            when = f"{point.delay_s:.2f} s after {point.moment} no. {point.nth}"
            what = f"{work.strategy}: {point.victim} {point.how} {when}"
            try:
                found = await work.point(point)
            except (AssertionError, TimeoutError) as exc:
                failed += 1
                found = f"FAILED: {str(exc) or 'it did not end in time'}"
            print(f"{point.number:3d}  {what:88s} {time.monotonic() - began:5.1f} s  {found}", flush=True)
    print(
        f"seed {seed}: {count - failed} of {count} points: same bytes, each update counted once, nobody trained twice"
    )
    return failed


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--points", type=int, default=10)
    parser.add_argument("--only", type=int, help="Just this point of the seed")
    arguments = parser.parse_args()
    home = Path(tempfile.mkdtemp(prefix="fedtide-faults-"))
    try:
        failed = asyncio.run(campaign(arguments.seed, arguments.points, home, arguments.only))
    finally:
        if "failed" in locals() and not failed:
            shutil.rmtree(home, ignore_errors=True)
        else:
            print(f"logs are in {home}")
    return min(failed, 99)


if __name__ == "__main__":
    sys.exit(main())
