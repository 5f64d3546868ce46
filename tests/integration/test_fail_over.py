"""Two coordinators: one leads, and when it is gone or frozen the other takes over, without a human."""

from __future__ import annotations

import json
import os
import signal
import urllib.request
from collections.abc import Iterator

import pytest

from tests.conftest import APPS
from tests.integration.conftest import bring_up
from tests.integration.installation import Installation, until


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Installation]:
    """Two coordinators, one region, two nodes."""
    there = bring_up(tmp_path_factory.mktemp("pair"), "eu", 2, "--coordinators", "2")
    yield there
    there.run("down")


def _roles(there: Installation) -> list[str]:
    roles = []
    for url in there.state["apis"]:
        try:
            with urllib.request.urlopen(f"{url}/healthz", timeout=2) as answer:
                roles.append(json.load(answer)["role"])
        except OSError:
            roles.append("gone")
    return roles


def _leader(there: Installation) -> str:
    until(lambda: "leader" in _roles(there), "a leader")
    return ("coordinator", "coordinator-2")[_roles(there).index("leader")]


def test_a_standby_shows_the_way_to_the_leader(pair: Installation) -> None:
    until(lambda: sorted(_roles(pair)) == ["leader", "standby"], "one leader and one standby")
    standby = pair.state["apis"][_roles(pair).index("standby")]
    asked = urllib.request.Request(f"{standby}/v1/status", headers=pair.shown)
    with urllib.request.urlopen(asked, timeout=10) as answer:
        assert json.load(answer)["nodes"]["known"] == 2


@pytest.mark.parametrize("how", [signal.SIGKILL, pytest.param(signal.SIGSTOP, marks=pytest.mark.slow)])
def test_a_run_survives_the_death_of_its_leader_and_the_old_one_does_no_harm(
    pair: Installation, how: signal.Signals
) -> None:
    until(lambda: sorted(_roles(pair)) == ["leader", "standby"], "one leader and one standby")
    leader = _leader(pair)
    terms = len(pair.events(kind="coordinator.elected"))
    start = ("run", "start", "--app", str(APPS / "mean"), "--rounds", "3", "--set", "delay=1.5")
    run = pair.json(*start)["run"]
    until(lambda: bool(pair.show(run).rounds[1:]), "the first round")
    pid = pair.child(leader)
    os.kill(pid, how)
    try:
        until(lambda: len(pair.events(kind="coordinator.elected")) > terms, "a new leader")
    finally:
        if how == signal.SIGSTOP:
            os.kill(pid, signal.SIGCONT)
    view = pair.finish(run)
    assert (view.state, view.attempt) == ("completed", 1), view
    assert [r.metrics["train_calls"] for r in view.rounds if r.round] == [1.0, 2.0, 3.0]
