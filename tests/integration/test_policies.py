"""Round policies with real nodes: quorums, deadlines, trials, asynchronous rounds, pauses, evaluations, stop rules."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from fedtide.fabric.messages.views import PhaseView, RunView
from fedtide.fabric.tensors.frame import Tensor
from tests.conftest import APPS
from tests.integration.installation import Installation, until
from tests.integration.releases import produce

SLOW_FIRST = ("--set", "delay=3")


def _train(installation: Installation, *options: str) -> RunView:
    return installation.train(APPS / "mean", *options)


def _phase(view: RunView, number: int, phase: str = "train") -> PhaseView:
    return next(r for r in view.rounds if r.round == number).phases[phase]


def test_a_round_closes_with_its_quorum_and_does_not_wait_for_the_slow_one(installation: Installation) -> None:
    view = _train(installation, "--rounds", "2", *SLOW_FIRST, "--policy", "quorum=3")
    assert view.state == "completed", view
    train = _phase(view, 1)
    assert (train.cause, len(train.received)) == ("quorum", 3)
    assert {r.category for r in train.refused.values()} <= {"not_needed", "late"}


def test_a_grace_time_lets_the_slow_one_in(installation: Installation) -> None:
    view = _train(installation, "--rounds", "1", "--set", "delay=0.5", "--policy", "quorum=3,grace_s=60")
    train = _phase(view, 1)
    assert (train.cause, len(train.received)) == ("all answered", 4)


def test_a_grace_time_that_is_over_closes_the_round(installation: Installation) -> None:
    view = _train(installation, "--rounds", "1", "--set", "delay=20", "--policy", "quorum=3,grace_s=1")
    assert (_phase(view, 1).cause, len(_phase(view, 1).received)) == ("grace over", 3)


def test_more_nodes_are_asked_than_are_needed_and_in_turn(installation: Installation) -> None:
    view = _train(installation, "--rounds", "2", "--select", "nodes=2,over_provision=1.5")
    assert [(_phase(view, n).asked, len(_phase(view, n).received)) for n in (1, 2)] == [(3, 2), (3, 2)]


def test_a_round_that_too_few_answer_is_tried_again_and_then_fails_the_run_with_the_reason(
    installation: Installation,
) -> None:
    view = _train(
        installation,
        "--rounds",
        "1",
        "--set",
        "delay=30",
        "--round-timeout",
        "2",
        "--policy",
        "min_updates=4,retries=1",
    )
    assert view.state == "failed"
    assert "abandoned 2 times" in view.reason
    assert "3 of 4 nodes" in view.reason
    (last,) = [r for r in view.rounds if r.round == 1]
    assert (last.state, last.trial, len(last.abandoned)) == ("abandoned", 2, 1)


def test_asynchronous_rounds_close_by_their_buffer_and_count_what_is_stale(installation: Installation) -> None:
    options = ("--rounds", "6", "--set", "delay=1", "--policy", "mode=async,buffer=2", "--set", "size=100000")
    view = _train(installation, *options)
    assert view.state == "completed", view
    trains = [_phase(view, n) for n in range(1, 7)]
    assert {t.cause for t in trains} == {"buffer full"}
    assert all(len(t.received) == 2 for t in trains)
    assert any(t.stale for t in trains)
    weights = np.load(installation.out(view.run) / "final.npz")["w"]
    assert np.isfinite(weights).all()
    assert weights[0] > 0


@pytest.mark.slow
def test_a_semi_synchronous_round_closes_at_its_deadline_and_counts_the_slow_one_later(
    installation: Installation,
) -> None:
    options = ("--rounds", "3", "--set", "delay=3", "--round-timeout", "2", "--policy", "mode=semi_sync")
    view = _train(installation, *options)
    assert view.state == "completed", view
    assert _phase(view, 1).cause == "deadline"
    assert any(_phase(view, n).stale == ["eu-1"] for n in (2, 3))


def test_a_paused_run_has_no_process_and_resumes_in_its_round_without_asking_again(installation: Installation) -> None:
    start = ("run", "start", "--app", str(APPS / "mean"), "--rounds", "3", "--set", "delay=1.5")
    run = installation.json(*start)["run"]
    until(lambda: bool(installation.show(run).rounds[1:]), "the first round")
    assert installation.json("run", "pause", run)["state"] == "paused"
    note = installation.home / "coordinator" / "runs" / run / "aggregator.pid"
    until(lambda: not note.exists(), "the end of the aggregator")
    assert installation.json("run", "resume", run)["state"] == "starting"
    view = installation.finish(run)
    assert (view.state, view.attempt) == ("completed", 2)
    assert [r.metrics["train_calls"] for r in view.rounds if r.round] == [1.0, 2.0, 3.0]
    refused = installation.run("run", "resume", run)
    assert refused.returncode == 2
    assert "is completed, which `resume` and `stop` cannot change" in refused.stderr


def test_a_run_stops_when_it_has_learned_enough_and_says_why(installation: Installation) -> None:
    view = _train(installation, "--rounds", "9", "--stop", "metric=mean,target=4")
    assert view.state == "completed"
    assert "mean is 5 after round 2, the target is 4" in view.reason
    assert [r.round for r in view.rounds] == [0, 1, 2]


def test_nodes_evaluate_only_as_often_as_asked_and_after_the_last_round(installation: Installation) -> None:
    view = _train(installation, "--rounds", "3", "--policy", "evaluate_every=2")
    evaluated = [r.round for r in view.rounds if "evaluate" in r.phases]
    assert evaluated == [2, 3]


def test_an_update_over_the_size_limit_is_refused_with_the_reason(installation: Installation) -> None:
    options = ("--rounds", "1", "--set", "size=10000", "--policy", "max_update_bytes=30000,retries=0")
    view = _train(installation, *options)
    assert view.state == "failed"
    refused = _phase(view, 1).refused
    assert {r.category for r in refused.values()} == {"too_large"}
    assert "allowed are 30000" in refused["eu-1"].reason


def test_nodes_say_how_good_a_release_is_and_nobody_trains(installation: Installation) -> None:
    run = _train(installation, "--rounds", "1").run
    arrays = [Tensor.of("w", np.ones(100, np.float32)), Tensor.of("b", np.zeros((), np.float64))]
    asyncio.run(produce(installation.hub, run, 2.0, model="judged", arrays=arrays))
    installation.until_events("release.published", about="judged")
    view = installation.finish(installation.json("run", "evaluate", "judged")["run"])
    assert (view.state, view.reason) == ("completed", "evaluated; no release is made")
    assert list(view.rounds[-1].phases) == ["evaluate"]
    assert view.rounds[-1].metrics["eval_total"] == 100.0
    assert len(installation.model("judged").releases) == 1


def test_a_policy_that_makes_no_sense_is_refused_before_anything_starts(installation: Installation) -> None:
    for option, value, words in (
        ("--policy", "quorm=3", "there is no such field; did you mean 'quorum'?"),
        ("--policy", "quorum=x", "quorum"),
        ("--select", "nodes=2,fraction=0.5", "either `nodes` or `fraction`"),
    ):
        refused = installation.run("run", "start", "--app", str(APPS / "mean"), option, value)
        assert refused.returncode == 2
        assert words in refused.stderr
