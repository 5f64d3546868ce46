"""`fedtide run ...` and `fedtide round ...`."""

from __future__ import annotations

import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import typer

from fedtide.console import endpoints
from fedtide.console.app_bundles import Train, TrainWith, WithWheels, pushed
from fedtide.console.cli import grammar
from fedtide.console.cli.verbs import removes, shows
from fedtide.console.client import Client
from fedtide.console.output import Format, Limit, Output, Timeout, console, say, show_list, show_one
from fedtide.fabric.errors import ConfigError, NotFound, TransientError
from fedtide.fabric.messages.logs import LogLine
from fedtide.fabric.messages.requests import RunActionName
from fedtide.fabric.messages.views import RUN_ENDED, RunState, RunView
from fedtide.fabric.plans.round_policy import RoundPolicy, Selection, StopRule
from fedtide.fabric.plans.run_spec import RunRequest
from fedtide.fabric.validation import checked

runs_app = typer.Typer(no_args_is_help=True, help="Federated runs: start, look at, cancel.")
rounds_app = typer.Typer(no_args_is_help=True, help="Single rounds.")

FOLLOW_S = 1.0
"""Between two questions for more of a log: a node tells nobody that its app has printed something."""
Watch = Annotated[bool, typer.Option("--watch", "-w", help="Stay and show progress until the end")]


@runs_app.command("start")
def start(
    app: Annotated[Path, typer.Option("--app", help="Flower app directory (with pyproject.toml)")],
    rounds: Annotated[int | None, typer.Option("--rounds", min=1, help="Instead of the app's own number")] = None,
    settings: Annotated[list[str] | None, typer.Option("--set", help="Run config override key=value; repeat")] = None,
    nodes: Annotated[str, typer.Option("--nodes", help="Labels, e.g. region=eu-west,zone=a (a|b for either)")] = "",
    model: Annotated[str | None, typer.Option("--model", help="Registry name of the result")] = None,
    base: Annotated[
        str | None, typer.Option("--base", help="Start from a release (latest, or a version), or from RUN or RUN/ROUND")
    ] = None,
    timeout: Annotated[float, typer.Option("--round-timeout", min=0.1, help="Seconds a round may take")] = 3600.0,
    select: Annotated[str, typer.Option("--select", help="Which nodes are asked, e.g. nodes=20,idle=true")] = "",
    policy: Annotated[str, typer.Option("--policy", help="When rounds close, e.g. quorum=8,grace_s=10")] = "",
    stop: Annotated[str, typer.Option("--stop", help="When to end early, e.g. metric=accuracy,target=0.95")] = "",
    train: Train = TrainWith.flower,
    with_wheels: WithWheels = False,
    track: Annotated[
        list[str] | None, typer.Option("--track", help="mlflow=URL, tensorboard, experiment=NAME, or none; repeat")
    ] = None,
    label: Annotated[
        list[str] | None, typer.Option("--label", help="What its costs are told apart by, e.g. customer=acme; repeat")
    ] = None,
    watch: Watch = False,
    output: Output = Format.table,
) -> None:
    """Start a federated run of a Flower app."""
    from fedtide.fabric.flower.apps import describe, fuse

    described = describe(app)
    overrides = grammar.settings(settings or [], described.config)
    if rounds is not None and "num-server-rounds" in described.config:
        overrides.setdefault("num-server-rounds", rounds)
    fuse(described.config, overrides)
    asked_policy = grammar.fields("--policy", policy, RoundPolicy)
    if "deadline_s" not in asked_policy.model_fields_set:
        asked_policy = checked(
            RoundPolicy, {**asked_policy.model_dump(exclude_unset=True), "deadline_s": timeout}, "--round-timeout"
        )
    client = Client.find()
    request = RunRequest(
        app=pushed(client, app, overrides, train, with_wheels=with_wheels),
        model=model or described.model,
        rounds=rounds,
        run_config=overrides,
        selector=grammar.labels("--nodes", nodes),
        base=base,
        selection=grammar.fields("--select", select, Selection),
        policy=asked_policy,
        stop=grammar.fields("--stop", stop, StopRule) if stop else None,
        track=grammar.tracking(track, described.track) if track else described.track,
        labels=grammar.labels("--label", ",".join(label or [])),
    )
    _started(client, client.send(endpoints.start_run(request)), watch, output)


@rounds_app.command("trigger")
def trigger(
    target: Annotated[str, typer.Argument(help="A model of the registry, or a Flower app directory")],
    region: Annotated[str | None, typer.Option("--region", help="Only nodes of this region")] = None,
    train: Train = TrainWith.flower,
    watch: Watch = False,
    output: Output = Format.table,
) -> None:
    """One more round: of a model, from its latest release; or the first round of an app."""
    selector = {"region": region} if region is not None else {}
    if Path(target).is_dir():
        nodes = f"region={region}" if region is not None else ""
        start(Path(target), rounds=1, nodes=nodes, train=train, watch=watch, output=output)
        return
    if train is TrainWith.onnx:
        raise ConfigError(
            "--train",
            "a release's app goes out as it was",
            f"Use: fedtide run start --app DIR --base latest --model {target} --train onnx",
        )
    client = Client.find()
    if not client.send(endpoints.model(target)).releases:
        raise NotFound(f"model {target!r} has no release yet", "Start a run of its app with `fedtide run start`")
    request = RunRequest(model=target, rounds=1, base="latest", selector=selector)
    _started(client, client.send(endpoints.start_run(request)), watch, output)


def _started(client: Client, view: RunView, watch: bool, output: Format) -> None:
    if watch:
        _follow(client, view.run, output)
    elif output is Format.table:
        say(f"{view.run} requested. Follow it: fedtide run watch {view.run}")
    else:
        show_one(view, output)


@runs_app.command("ls")
def ls(
    state: Annotated[RunState | None, typer.Option("--state", help="Only runs in this state")] = None,
    model: Annotated[str, typer.Option("--model", help="Only runs of this model")] = "",
    app: Annotated[str, typer.Option("--app", help="Only runs of this app")] = "",
    limit: Limit = 1000,
    output: Output = Format.table,
) -> None:
    """All runs, oldest first."""
    listing = endpoints.runs(state=state, model=model, app=app)
    views = list(Client.find().every(listing, limit))
    show_list(views, [_row(view) for view in views], output)


def _row(view: RunView) -> dict[str, Any]:
    shown = view.model_dump(include={"run", "app", "model", "version", "state"})
    counts = {"rounds": len(view.rounds), "participants": len(view.participants)}
    return {**shown, **counts, "requested_at": view.requested_at, "reason": view.reason}


@shows(runs_app)
def show(run: str, output: Output = Format.table) -> None:
    """One run with its rounds."""
    view = Client.find().send(endpoints.run(run))
    if output is not Format.table:
        show_one(view, output)
        return
    from fedtide.console.watching import draw_run

    console().print(draw_run(view))


@runs_app.command("logs")
def logs(
    run: str,
    nodes: Annotated[list[str] | None, typer.Option("--node", help="What the app printed there; repeat")] = None,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Stay and show what comes, until the run ends")
    ] = False,
    output: Output = Format.table,
) -> None:
    """What the ServerApp printed and logged, or with --node the ClientApp. `-o json`: a record a line."""
    client = Client.find()
    places = nodes or [""]
    after: dict[str, datetime] = {}
    while True:
        ended = client.send(endpoints.run(run)).state in RUN_ENDED  # before: what is read then is all
        for place in places:
            for line in _lines(client, run, place, after):
                _say_line(line, place if len(places) > 1 else "", output)
        if ended or not follow:
            return
        time.sleep(FOLLOW_S)


def _lines(client: Client, run: str, place: str, after: dict[str, datetime]) -> Iterator[LogLine]:
    """What was printed since the last time."""
    while True:
        page = client.send(endpoints.run_logs(run, place, after.get(place)))
        yield from page.lines
        if page.lines:
            after[place] = page.lines[-1].at
        if not page.more:
            return


def _say_line(line: LogLine, place: str, output: Format) -> None:
    if output is not Format.table:
        say(line.model_dump_json(exclude={"must_understand"}))
        return
    head = [f"{line.at:%Y-%m-%d %H:%M:%S.%f}"[:-3], place, line.task, line.level]
    say(" ".join(part for part in (*head, line.text) if part))


@runs_app.command("watch")
def watch_run(run: str, output: Output = Format.table) -> None:
    """Follow a run to its end; exit code 1 if it does not complete (`-o json`: one view a line)."""
    _follow(Client.find(), run, output)


@runs_app.command("wait")
def wait(
    run: str,
    state: Annotated[RunState, typer.Option("--for", help="The state that is waited for")] = "completed",
    timeout: Timeout = 3600.0,
) -> None:
    """Wait until a run is in a state. Exit code 1: it ended otherwise; 75: timeout."""
    for view in Client.find().stream(endpoints.watch_run(run), timeout_s=timeout):
        if view.state == state or view.state in RUN_ENDED:
            say(f"{run} {view.state}" + (f": {view.reason}" if view.reason else ""))
            raise typer.Exit(0 if view.state == state else 1)
    raise TransientError(f"{run} is not {state} after {timeout:g} s", f"See `fedtide run show {run}`")


@runs_app.command("evaluate")
def evaluate(
    model: Annotated[str, typer.Argument(help="A model of the registry")],
    version: Annotated[str, typer.Option("--version", help="Which release: latest, or a number")] = "latest",
    nodes: Annotated[str, typer.Option("--nodes", help="Labels, as for `run start`")] = "",
    watch: Watch = False,
    output: Output = Format.table,
) -> None:
    """One round that trains nothing: the nodes say how good a release is on their data."""
    client = Client.find()
    selector = grammar.labels("--nodes", nodes)
    asked = RunRequest(model=model, base=version, purpose="evaluate", rounds=1, selector=selector)
    _started(client, client.send(endpoints.start_run(asked)), watch, output)


@runs_app.command("pause")
def pause(run: str, output: Output = Format.table) -> None:
    """End a run's aggregator; delivered and later updates wait for `run resume`."""
    _act(run, "pause", output)


@runs_app.command("resume")
def resume(run: str, output: Output = Format.table) -> None:
    """Resume a paused run in its current round, or one that failed or was cancelled after its last closed round."""
    _act(run, "resume", output)


@runs_app.command("cancel")
def cancel(run: str, output: Output = Format.table) -> None:
    """End a run; its nodes stop their tasks. `run resume` goes on after its last closed round."""
    _act(run, "cancel", output)


@runs_app.command("stop")
def stop_run(
    run: str,
    keep: Annotated[bool, typer.Option("--keep", help="Complete the run: release what it has learned so far")] = False,
    output: Output = Format.table,
) -> None:
    """End a run now; with --keep what it has learned becomes a release, also of a run that failed."""
    _act(run, "stop" if keep else "cancel", output)


@removes(runs_app, also="remove")
def remove(run: str) -> None:
    """Forget a run that has ended, with its checkpoints. Its release stays."""
    Client.find().send(endpoints.remove_run(run))
    say(f"{run} removed")


def _act(run: str, action: RunActionName, output: Format) -> None:
    view = Client.find().send(endpoints.act_on_run(run, action))
    if output is Format.table:
        say(f"{run} {view.state}")
    else:
        show_one(view, output)


def _follow(client: Client, run: str, output: Format) -> None:
    from fedtide.console.watching import draw_run, follow, run_lines

    views = client.stream(endpoints.watch_run(run))
    last = follow(views, draw_run, run_lines, json=output is not Format.table)
    if last is None or last.state != "completed":
        raise typer.Exit(1)
