"""What users of federated learning report: one odd node, waits without end, errors without a line, lost answers."""

from __future__ import annotations

import json
from typing import Any

import pytest

from fedtide.fabric.messages.views import RunView
from tests.conftest import APPS
from tests.fidelity.test_referee import APP, config_of
from tests.integration.installation import Installation


def _view(there: Installation, case: str, *options: str, **plan: Any) -> RunView:
    settings = [w for key, value in config_of(case, **plan).items() for w in ("--set", f"{key}={value}")]
    return there.train(APP, *settings, *options)


@pytest.mark.parametrize(
    "case", ["FedAvg", "Saving", *(pytest.param(s, marks=pytest.mark.slow) for s in ("FedMedian", "FedAdam"))]
)
@pytest.mark.parametrize(
    ("odd", "phase", "category"),
    [
        ("train", "train", "malformed"),
        ("weight", "train", "bad_weight"),
        ("nan", "train", "not_finite"),
        ("evaluate", "evaluate", "malformed"),
    ],
)
def test_one_odd_answer_costs_one_answer(
    installation: Installation, case: str, odd: str, phase: str, category: str
) -> None:
    view = _view(installation, case, odd=odd, dtypes=["float32"])
    assert view.state == "completed", view.reason
    for each in view.rounds:
        assert {n: r.category for n, r in each.phases[phase].refused.items()} == {"eu-2": category}
        assert len(each.phases[phase].received) == 3


@pytest.mark.parametrize("case", ["FedMedian", "Copied"])
def test_a_wrong_shape_costs_one_answer_wherever_flower_averages(installation: Installation, case: str) -> None:
    view = _view(installation, case, odd="shape", dtypes=["float32"])
    assert view.state == "completed", view.reason
    for each in view.rounds:
        assert {n: r.category for n, r in each.phases["train"].refused.items()} == {"eu-2": "wrong_shape"}


def test_what_flower_does_can_be_had_with_an_option(installation: Installation) -> None:
    view = _view(installation, "FedAvg", "--policy", "admission=off", odd="train", dtypes=["float32"])
    assert view.state == "failed" and "InconsistentMessageReplies" in view.reason


def test_weights_of_nothing_end_no_run(installation: Installation) -> None:
    view = _view(installation, "FedAvg", evaluated=[0, 0, 0, 0], dtypes=["float32"])
    assert view.state == "completed"
    assert {r.category for r in view.rounds[0].phases["evaluate"].refused.values()} == {"bad_weight"}
    view = _view(installation, "FedAvg", "--policy", "retries=1", examples=[0, 0, 0, 0], dtypes=["float32"])
    assert view.state == "failed" and "the weights of all answers are 0" in view.reason


def test_an_error_of_all_nodes_ends_the_run_after_one_trial_with_the_apps_line(installation: Installation) -> None:
    view = _view(installation, "FedAvg", raises=[0, 1, 2, 3])
    assert view.state == "failed" and "KeyError: 'rows' (referee_client.py:" in view.reason
    assert (view.rounds[0].trial, view.rounds[0].abandoned) == (1, [])
    told = [refused.reason for refused in view.rounds[0].phases["train"].refused.values()]
    assert sum("raise KeyError" in reason for reason in told) == 1, "the traceback is there once"
    view = _view(installation, "FedAvg", odd="forgets")
    assert "(referee_client.py:" in view.reason and "returned None, expected a flwr Message" in view.reason


def test_a_wait_for_nodes_says_what_it_waits_for_and_ends(installation: Installation) -> None:
    options = ("--app", str(APP), "--select", "nodes=1", "--round-timeout", "3", "--policy", "retries=0")
    run = installation.json("run", "start", *options)["run"]
    waiting = installation.until_run(run, lambda view: "wants" in view.reason)
    assert waiting.reason == "the app wants 4 nodes, its cohort has 1"
    view = installation.finish(run)
    assert view.state == "failed" and "its cohort had 1 for 3 s" in view.reason


def test_what_is_pushed_arrives_also_if_nobody_waits_for_it(installation: Installation) -> None:
    view = _view(installation, "leaves")
    assert view.state == "completed"
    assert len(view.rounds[0].phases["query"].received) == 4
    assert view.rounds[0].state == "closed"


@pytest.mark.slow
def test_metrics_of_many_rounds_are_not_bounded_by_a_message(installation: Installation) -> None:
    view = _view(installation, "FedAvg", "--rounds", "12", lists=20_000, dtypes=["float32"])
    assert view.state == "completed" and len(view.rounds) == 12


def test_a_run_that_only_evaluates_trains_nothing_and_releases_nothing(installation: Installation) -> None:
    view = _view(installation, "FedAvg", kwargs={"fraction_train": 0.0, "min_train_nodes": 0}, dtypes=["float32"])
    assert view.state == "completed" and "nothing was trained" in view.reason
    assert set(view.rounds[0].phases) == {"evaluate"}


def test_a_misspelt_metric_of_a_stop_rule_ends_the_run_at_once(installation: Installation) -> None:
    view = installation.train(APPS / "mean", "--stop", "metric=los,mode=min,patience=2")
    assert view.state == "failed" and "there is no metric 'los'" in view.reason and "there are:" in view.reason


def _slow_options(installation: Installation, seconds: float, *options: str, **plan: Any) -> str:
    """A run of four rounds that takes its time, with a model of its own; its id."""
    config = config_of("FedAvg", seconds=seconds, dtypes=["float32"], **plan)
    settings = [w for key, value in config.items() for w in ("--set", f"{key}={value}")]
    run: str = installation.json("run", "start", "--app", str(APP), "--rounds", "4", *settings, *options)["run"]
    return run


def _closed(view: RunView) -> list[int]:
    return [each.round for each in view.rounds if each.state == "closed"]


@pytest.mark.slow
def test_a_cancelled_run_goes_on_after_its_last_round(installation: Installation) -> None:
    run = _slow_options(installation, 0.6)
    installation.until_run(run, lambda view: len(_closed(view)) >= 2)
    assert installation.run("run", "cancel", run).returncode == 0
    done = _closed(installation.finish(run))
    installation.until_events("run.cleaned_up", about=run)
    assert installation.run("run", "resume", run).returncode == 0
    view = installation.finish(run)
    assert view.state == "completed" and _closed(view) == [1, 2, 3, 4]
    opened = [event.data["round"] for event in installation.events(about=run, kind="round.opened")]
    assert all(opened.count(number) == 2 for number in done), "no round was asked for again"
    assert installation.run("run", "resume", run).returncode != 0, "it is completed"
    again = _slow_options(installation, 0.0)
    assert installation.finish(again).state == "completed"
    final = [(installation.out(each) / "trace.json").read_text() for each in (run, again)]
    assert json.loads(final[0])["result-0"] == json.loads(final[1])["result-0"], "as if it had never been cancelled"


def test_a_run_that_failed_goes_on_and_one_that_is_stopped_keeps_what_it_has(installation: Installation) -> None:
    run = _slow_options(installation, 0.3, "--policy", "retries=0", fails_once=5)
    view = installation.finish(run)
    assert view.state == "failed" and _closed(view) == [1, 2]
    installation.until_events("run.cleaned_up", about=run)
    assert installation.run("run", "stop", run, "--keep").returncode == 0
    view = installation.finish(run)
    assert view.state == "completed" and "stopped by a person after round 2" in view.reason
    run = _slow_options(installation, 0.5)
    installation.until_run(run, lambda view: len(_closed(view)) >= 1)
    assert installation.run("run", "stop", run, "--keep").returncode == 0
    view = installation.finish(run)
    assert view.state == "completed" and "stopped by a person after round" in view.reason and len(_closed(view)) < 4
    assert installation.run("run", "rm", run).returncode == 0
    assert run not in [each.run for each in installation.runs()]


def _records(installation: Installation, run: str, *options: str) -> list[dict[str, str]]:
    done = installation.run("run", "logs", run, *options, "-o", "json")
    return [json.loads(text) for text in done.stdout.splitlines()]


def test_what_an_app_prints_can_be_read_from_far(installation: Installation) -> None:
    view = _view(installation, "FedAvg", prints=True, dtypes=["float32"])
    lines = _records(installation, view.run)
    told = [(line["level"], line["text"]) for line in lines]
    assert ("", "the server printed this") in told
    assert told.count(("WARNING", "referee: the server logged this")) == 1, "said once"
    assert any(level == "INFO" and "aggregate_train: Received 4 results" in text for level, text in told)
    assert not any("\x1b" in text for _, text in told)
    there = installation.run("run", "logs", view.run, "--node", "eu-1", "--node", "us-2").stdout
    assert there.count("eu-1") and there.count("us-2") and "the client printed this" in there
    lines = _records(installation, view.run, "--node", "eu-1")
    assert {line["task"].split("-r")[0] for line in lines} == {view.run}
    assert ("ERROR", "referee: the client logged this") in [(line["level"], line["text"]) for line in lines]


def test_a_log_is_followed_while_the_run_goes_on(installation: Installation) -> None:
    run = _slow_options(installation, 0.3, prints=True)
    followed = installation.process("run", "logs", run, "-f")
    assert followed.returncode == 0 and followed.stdout.count("the server printed this") == 1
    assert installation.show(run).state == "completed"


def test_no_run_sees_what_another_has_done_to_a_module(installation: Installation) -> None:
    for _ in range(2):
        view = _view(installation, "FedAvg", remembers=True, dtypes=["float32"])
        assert view.state == "completed"
        assert view.rounds[-1].metrics["train_remembered"] == 2.0, "the rounds of this run, and of no other"


def test_a_run_starts_from_what_another_has_left(installation: Installation) -> None:
    run = _slow_options(installation, 0.3, "--policy", "retries=0", fails_once=5)
    assert installation.finish(run).state == "failed"
    config = config_of("FedAvg", dtypes=["float32"])
    settings = [w for key, value in config.items() for w in ("--set", f"{key}={value}")]
    again = installation.train(APP, *settings, "--rounds", "2", "--base", run)
    whole = installation.train(APP, *settings, "--rounds", "4")
    ends = [json.loads((installation.out(each.run) / "trace.json").read_text()) for each in (again, whole)]
    assert ends[0]["result-0"]["arrays"] == ends[1]["result-0"]["arrays"], "two rounds after two are four"
    refused = installation.run("run", "start", "--app", str(APP), *settings, "--base", f"{run}/7")
    assert refused.returncode != 0 and "after rounds: 2" in refused.stderr
