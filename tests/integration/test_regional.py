"""Updates that are summed elsewhere, in regions or shards: the same bytes, whatever happens to those who sum."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest

from fedtide.fabric.messages.views import RunView
from tests.conftest import APPS
from tests.integration.conftest import bring_up
from tests.integration.installation import Installation, children, until

START = ("run", "start", "--app", str(APPS / "sums"))


@pytest.fixture(scope="module")
def regional(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Installation]:
    """Two regions of two nodes, each with a partial aggregator."""
    there = bring_up(tmp_path_factory.mktemp("regional"), "eu,us", 2, "--regional-aggregators")
    yield there
    there.run("down")


@pytest.fixture(scope="module")
def flat(regional: Installation) -> bytes:
    """The model that an aggregator makes alone."""
    view = regional.train(APPS / "sums")
    assert view.state == "completed", view.reason
    return _model(regional, view)


def _model(there: Installation, view: RunView) -> bytes:
    return (there.out(view.run) / "final.npz").read_bytes()


def _received(there: Installation, run: str) -> int:
    rounds = there.show(run).rounds
    return sum(len(t.received) for r in rounds for t in r.phases.values())


def _forwarded(there: Installation, region: str, run: str) -> int:
    log = (there.home / "logs" / f"regional-{region}.log").read_text()
    return sum("fold.forwarded" in line and run in line for line in log.splitlines())


def test_regions_forward_one_sum_each_and_the_model_is_the_same(regional: Installation, flat: bytes) -> None:
    view = regional.train(APPS / "sums", "--policy", "regional=true")
    assert view.state == "completed", view.reason
    assert _model(regional, view) == flat
    assert [_forwarded(regional, region, view.run) for region in ("eu", "us")] == [2, 2]
    costs = regional.json("cost", "--by", "region,phase", "--where", f"run={view.run}")["rows"]
    summed = {row["group"]["region"]: row["quantities"]["cpu"] for row in costs if row["group"]["phase"] == "aggregate"}
    assert set(summed) == {"cloud", "eu", "us"} and all(summed.values()), "who sums in a region costs there"


def test_an_update_that_cannot_be_summed_is_refused_in_its_region(regional: Installation) -> None:
    poisoned = ("--set", "poisoned=2")
    alone = regional.train(APPS / "sums", *poisoned)
    view = regional.train(APPS / "sums", "--policy", "regional=true", *poisoned)
    refused = [t.refused for r in view.rounds for t in r.phases.values() if t.refused]
    assert [[r.category for r in each.values()] for each in refused] == [["not_finite"], ["not_finite"]]
    assert _model(regional, view) == _model(regional, alone)


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_region_whose_aggregator_dies_or_freezes_is_summed_all_the_same(
    regional: Installation, flat: bytes, how: signal.Signals
) -> None:
    run = regional.json(*START, "--policy", "regional=true", "--set", "delay=4.0")["run"]

    until(lambda: _received(regional, run) == 3, "all updates but one")
    pid = regional.child("regional-eu")
    os.kill(pid, how)
    try:
        view = regional.finish(run)
    finally:
        if how == signal.SIGSTOP:
            os.kill(pid, signal.SIGCONT)
    assert view.state == "completed", view.reason
    assert _model(regional, view) == flat


@pytest.mark.parametrize(
    "policy",
    [
        pytest.param("regional=true", marks=pytest.mark.slow),
        pytest.param("grace_s=0", marks=pytest.mark.slow),
        pytest.param("shards=2", marks=pytest.mark.slow),
        pytest.param("up=int8,down=int8", marks=pytest.mark.slow),
    ],
)
def test_an_aggregator_that_is_killed_has_a_successor_that_makes_the_same_model(
    regional: Installation, policy: str
) -> None:
    whole = regional.train(APPS / "sums", "--policy", policy)
    run = regional.json(*START, "--policy", policy, "--set", "delay=4.0")["run"]
    until(lambda: _received(regional, run) >= 3, "most of the first round")
    os.kill(regional.aggregator(run), signal.SIGKILL)
    view = regional.finish(run)
    assert view.state == "completed", view.reason
    if "up=" in policy:
        return  # the rounding is seeded by the names of tasks, and those by that of the run
    assert _model(regional, view) == _model(regional, whole)


@pytest.mark.slow
def test_shards_make_the_same_model_and_refuse_the_same(regional: Installation, flat: bytes) -> None:
    view = regional.train(APPS / "sums", "--policy", "shards=3")
    assert view.state == "completed", view.reason
    assert _model(regional, view) == flat
    poisoned = regional.train(APPS / "sums", "--policy", "shards=3", "--set", "poisoned=2")
    alone = regional.train(APPS / "sums", "--set", "poisoned=2")
    assert _model(regional, poisoned) == _model(regional, alone)


@pytest.mark.slow
def test_a_shard_that_is_killed_is_started_again_and_knows_what_it_held(regional: Installation, flat: bytes) -> None:
    run = regional.json(*START, "--policy", "shards=2", "--set", "delay=4.0")["run"]

    until(lambda: _received(regional, run) >= 3, "most of the first round")
    (pid,) = children(regional.aggregator(run), "shard-1.json")
    os.kill(pid, signal.SIGKILL)
    view = regional.finish(run)
    assert view.state == "completed", view.reason
    assert _model(regional, view) == flat
