"""Triggers through the whole system: an event comes in, a run comes out, once."""

from __future__ import annotations

import asyncio
import json
import urllib.request
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from fedtide.console.embedded.nats_config import identity_of
from fedtide.console.home import Home
from fedtide.fabric.events.envelope import DriftReported, Event
from fedtide.fabric.nats.broker import Broker
from fedtide.fabric.nats.credentials import Access
from fedtide.fabric.nats.subjects import COLLECTOR, Subjects
from tests.conftest import APPS
from tests.integration.installation import Installation, until

RULE = """\
name: {name}
on: com.example.drift
where: psi > 0.2
policy: {policy}
do:
  kind: run
  app: {app}
  rounds: {rounds}
"""


def _apply(there: Installation, tmp_path: Path, name: str, policy: str = "replace", rounds: int = 1) -> None:
    file = tmp_path / "rule.yaml"
    file.write_text(RULE.format(name=name, policy=policy, app=APPS / "mean", rounds=rounds))
    done = there.run("trigger", "apply", str(file))
    assert done.returncode == 0, done.stderr


def _post(there: Installation, body: bytes, headers: dict[str, str]) -> Any:
    request = urllib.request.Request(f"{there.state['apis'][0]}/v1/events", body, {**headers, **there.shown})
    with urllib.request.urlopen(request, timeout=10) as response:
        return json.loads(response.read())


def test_a_webhook_event_starts_a_run_once_in_both_modes_of_cloudevents(
    installation: Installation, tmp_path: Path
) -> None:
    _apply(installation, tmp_path, "hook")
    structured = {"specversion": "1.0", "id": "e1", "source": "t", "type": "com.example.drift", "data": {"psi": 0.5}}
    for _ in range(2):
        answer = _post(installation, json.dumps(structured).encode(), {"Content-Type": "application/cloudevents+json"})
    assert answer["rules"]["hook"] == "fired"
    headers = {
        "ce-specversion": "1.0",
        "ce-id": "e2",
        "ce-type": "com.example.drift",
        "ce-source": "t",
        "Content-Type": "application/json",
    }
    answer = _post(installation, b'{"psi": 0.1}', headers)
    assert answer["rules"]["hook"] == "condition"
    (started,) = [line["started"] for line in installation.json("trigger", "history", "hook") if line["started"]]
    view = installation.finish(started)
    assert view.state == "completed"
    assert view.by == "trigger hook"
    assert len([r for r in installation.runs() if r.by == "trigger hook"]) == 1
    installation.run("trigger", "rm", "hook")


def test_a_test_says_what_would_happen_and_does_nothing(installation: Installation, tmp_path: Path) -> None:
    _apply(installation, tmp_path, "dry")
    said = installation.json("trigger", "test", "dry", "--type", "com.example.drift", "--set", "psi=0.9")
    assert said["outcome"] == "fired"
    assert said["would_start"].startswith("run-")
    assert installation.json("trigger", "test", "dry", "--type", "other")["outcome"] == "not listening"
    assert installation.json("trigger", "history", "dry") == []
    installation.run("trigger", "rm", "dry")


def test_a_firing_that_cannot_start_says_why_in_the_history(installation: Installation, tmp_path: Path) -> None:
    file = tmp_path / "rule.yaml"
    file.write_text("name: nothing\non: go\ndo: {kind: run, model: no-such-model}\n")
    assert installation.run("trigger", "apply", str(file)).returncode == 0
    installation.run("trigger", "fire", "--type", "go")

    def failed() -> bool:
        lines = installation.json("trigger", "history", "nothing")
        return [line["outcome"] for line in lines] == ["fired", "failed"] and "no-such-model" in lines[1]["reason"]

    until(failed, "the reason")
    installation.run("trigger", "rm", "nothing")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("name: x\non: y\ndo:\n  kind: run\n  rounds: 0\n", "rule.yaml:5:11: do.rounds"),
        ("name: x\non: y\npolicy: sometimes\ndo: {kind: run}\n", "rule.yaml:3:9: policy"),
        ("name: x\non: [\n", "rule.yaml:3:1"),
        ("- a\n", "rule.yaml:1:1"),
        ("name: x\non: y\nwhere: psi >\ndo: {kind: run}\n", "where, column"),
        ("name: x\nschedule: {cron: 99 * * * *}\ndo: {kind: run}\n", "schedule.cron"),
    ],
)
def test_a_wrong_rule_is_refused_by_line_and_column(
    installation: Installation, tmp_path: Path, text: str, words: str
) -> None:
    file = tmp_path / "rule.yaml"
    file.write_text(text)
    done = installation.run("trigger", "apply", str(file))
    assert done.returncode == 2
    assert words in done.stderr
    assert installation.json("trigger", "ls") == []


@pytest.mark.slow  # waits for the next full minute
def test_a_schedule_fires_at_its_minute(installation: Installation, tmp_path: Path) -> None:
    file = tmp_path / "rule.yaml"
    file.write_text("name: clock\nschedule: {cron: '* * * * *'}\ndo: {kind: run, model: no-such-model}\n")
    assert installation.run("trigger", "apply", str(file)).returncode == 0
    installation.until_events("trigger.firing_failed", about="clock", timeout_s=75)
    first = installation.json("trigger", "history", "clock")[0]
    assert first["outcome"] == "fired"
    assert first["signal"].endswith(":00+00:00")
    installation.run("trigger", "rm", "clock")


def test_a_drift_report_of_a_region_starts_a_run(installation: Installation, tmp_path: Path) -> None:
    file = tmp_path / "rule.yaml"
    text = RULE.format(name="drifted", policy="skip", app=APPS / "mean", rounds=1)
    text = text.replace("com.example.drift", "dev.fedtide.drift.reported")
    file.write_text(text.replace("psi > 0.2", "score > 0.2 and region == 'eu'"))
    assert installation.run("trigger", "apply", str(file)).returncode == 0

    async def report(score: float) -> None:
        access = Access(identity_of(Home(installation.home).store("eu")) / "collector.creds")
        broker = await Broker.connect(installation.leaf("eu"), "collector", access)
        event = Event.now("collector/eu", DriftReported(region="eu", model="m", score=score))
        subject = Subjects().report("eu", COLLECTOR, "drift-reported")
        await broker.publish(subject, event.model_dump_json().encode())
        await broker.close()

    asyncio.run(report(0.1))
    asyncio.run(report(0.3))
    history = ("trigger", "history", "drifted")
    installation.until_events("drift.reported", about="m", count=2)
    assert [line["outcome"] for line in installation.json(*history)] == ["condition", "fired"]
    assert installation.finish(installation.json(*history)[1]["started"]).state == "completed"
    why = installation.json("why", installation.json(*history)[1]["started"])
    assert any("because of dev.fedtide.drift.reported" in line for line in why["present"])
    installation.run("trigger", "rm", "drifted")


def test_a_burst_of_events_starts_one_run(installation: Installation, tmp_path: Path) -> None:
    _apply(installation, tmp_path, "burst", policy="skip", rounds=100_000)

    async def burst() -> None:
        headers = {"ce-specversion": "1.0", "ce-type": "com.example.drift", "ce-source": "burst"}
        url = f"{installation.state['apis'][0]}/v1/events"
        async with aiohttp.ClientSession() as session, asyncio.TaskGroup() as group:

            async def post(number: int) -> None:
                own = {**headers, **installation.shown, "ce-id": str(number)}
                async with session.post(url, data=b'{"psi": 0.9}', headers=own) as answer:
                    assert answer.status == 202

            for number in range(300):
                group.create_task(post(number))

    asyncio.run(burst())
    started = [r for r in installation.runs() if r.by == "trigger burst"]
    assert len(started) == 1
    installation.run("run", "cancel", started[0].run)
    installation.finish(started[0].run)
    installation.run("trigger", "rm", "burst")
