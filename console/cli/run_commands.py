"""`fedtide run ...` and `fedtide round ...`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import BaseModel, ValidationError

from fedtide.console.cli.app_bundles import Train, TrainWith, packed
from fedtide.console.cli.output import Format, Output, show_list, show_one
from fedtide.console.client import Client
from fedtide.fabric.errors import ConfigError, NotFound
from fedtide.fabric.messages.tasks import ConfigValues, Scalar
from fedtide.fabric.plans.round_policy import RoundPolicy, Selection, StopRule

runs_app = typer.Typer(no_args_is_help=True, help="Federated runs: start, look at, cancel.")
rounds_app = typer.Typer(no_args_is_help=True, help="Single rounds.")

Watch = Annotated[bool, typer.Option("--watch", "-w", help="Stay and show progress until the end")]


@runs_app.command("start")
def start(
    app: Annotated[Path, typer.Option("--app", help="Flower app directory (with pyproject.toml)")],
    rounds: Annotated[int | None, typer.Option("--rounds", min=1, help="Instead of the app's own number")] = None,
    settings: Annotated[list[str] | None, typer.Option("--set", help="Run config override key=value; repeat")] = None,
    nodes: Annotated[str, typer.Option("--nodes", help="Labels, e.g. region=eu-west,zone=a (a|b for either)")] = "",
    model: Annotated[str | None, typer.Option("--model", help="Registry name of the result")] = None,
    base: Annotated[str | None, typer.Option("--base", help="Start from a release: latest, or a version")] = None,
    timeout: Annotated[float, typer.Option("--round-timeout", min=0.1, help="Seconds a round may take")] = 3600.0,
    select: Annotated[str, typer.Option("--select", help="Who is asked, e.g. nodes=20,over_provision=1.3")] = "",
    policy: Annotated[str, typer.Option("--policy", help="When rounds close, e.g. quorum=8,grace_s=10")] = "",
    stop: Annotated[str, typer.Option("--stop", help="When to end early, e.g. metric=accuracy,target=0.95")] = "",
    train: Train = TrainWith.flower,
    watch: Watch = False,
    output: Output = Format.table,
) -> None:
    """Start a federated run of a Flower app."""
    from fedtide.fabric.flower.apps import describe, fuse

    described = describe(app)
    overrides = parse_settings(settings or [], described.config)
    if rounds is not None and "num-server-rounds" in described.config:
        overrides.setdefault("num-server-rounds", rounds)
    fuse(described.config, overrides)
    client = Client.find()
    reference = {
        "name": described.name,
        "bundle": json.loads(client.call("PUT", "/v1/bundles", packed(app, overrides, train))),
    }
    request = {
        "app": reference,
        "model": model or described.model,
        "rounds": rounds,
        "run_config": overrides,
        "selector": parse_labels(nodes),
        "base": base,
        "selection": parse_options("--select", select, Selection),
        "policy": {"deadline_s": timeout, **parse_options("--policy", policy, RoundPolicy)},
        "stop": parse_options("--stop", stop, StopRule) or None,
    }
    _started(client, client.post("/v1/runs", request), watch, output)


@rounds_app.command("trigger")
def trigger(
    target: Annotated[str, typer.Argument(help="A model of the registry, or a Flower app directory")],
    region: Annotated[str | None, typer.Option("--region", help="Only nodes of this region")] = None,
    train: Train = TrainWith.flower,
    watch: Watch = False,
    output: Output = Format.table,
) -> None:
    """One more round: of a model, from its latest release; or the first round of an app."""
    selector = f"region={region}" if region is not None else ""
    if Path(target).is_dir():
        start(Path(target), rounds=1, nodes=selector, train=train, watch=watch, output=output)
        return
    if train is TrainWith.onnx:
        raise ConfigError(
            "--train",
            "a release's app goes out as it was",
            f"Use: fedtide run start --app DIR --base latest --model {target} --train onnx",
        )
    client = Client.find()
    releases = client.get(f"/v1/models/{target}")["releases"]
    if not releases:
        raise NotFound(f"model {target!r} has no release yet", "Start a run of its app with `fedtide run start`")
    request = {
        "app": releases[-1]["lineage"]["app"],
        "run_config": releases[-1]["lineage"]["run_config"],
        "model": target,
        "rounds": 1,
        "base": "latest",
        "selector": parse_labels(selector),
    }
    _started(client, client.post("/v1/runs", request), watch, output)


def _started(client: Client, view: dict[str, Any], watch: bool, output: Format) -> None:
    if watch:
        _follow(client, view["run"], output)
    elif output is Format.table:
        typer.echo(f"{view['run']} requested. Follow it: fedtide run watch {view['run']}")
    else:
        show_one(view, output)


@runs_app.command("ls")
def ls(output: Output = Format.table) -> None:
    """All runs."""
    rows = Client.find().get("/v1/runs")
    table = [{**r, "rounds": len(r["rounds"]), "participants": len(r["participants"])} for r in rows]
    columns = ["run", "app", "model", "version", "state", "rounds", "participants", "requested_at", "reason"]
    show_list(table if output is Format.table else rows, columns, output)


@runs_app.command("show")
def show(run: str, output: Output = Format.table) -> None:
    """One run with its rounds."""
    view = Client.find().get(f"/v1/runs/{run}")
    if output is not Format.table:
        show_one(view, output)
        return
    from rich.console import Console

    from fedtide.console.cli.watching import draw_run

    Console().print(draw_run(view))


@runs_app.command("watch")
def watch_run(run: str, output: Output = Format.table) -> None:
    """Follow a run to its end; exit code 1 if it does not complete (`-o json`: one view a line)."""
    _follow(Client.find(), run, output)


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
    body = {"model": model, "base": version, "purpose": "evaluate", "rounds": 1, "selector": parse_labels(nodes)}
    _started(client, client.post("/v1/runs", body), watch, output)


@runs_app.command("pause")
def pause(run: str, output: Output = Format.table) -> None:
    """End a run's aggregator; delivered and later updates wait for `run resume`."""
    _changed(run, "pause", output)


@runs_app.command("resume")
def resume(run: str, output: Output = Format.table) -> None:
    """Go on with a paused run, in the round where it was."""
    _changed(run, "resume", output)


@runs_app.command("cancel")
def cancel(run: str, output: Output = Format.table) -> None:
    """End a run; its nodes stop their tasks."""
    _changed(run, "cancel", output)


def _changed(run: str, verb: str, output: Format) -> None:
    view = Client.find().post(f"/v1/runs/{run}/{verb}", {})
    if output is Format.table:
        typer.echo(f"{run} {view['state']}")
    else:
        show_one(view, output)


def _follow(client: Client, run: str, output: Format) -> None:
    from fedtide.console.cli.watching import draw_run, follow, run_lines

    views = client.stream(f"/v1/runs/{run}/watch")
    last: dict[str, Any] = {}
    if output is Format.table:
        last = follow(views, draw_run, run_lines)
    else:
        for last in views:
            typer.echo(json.dumps(last))
    if last.get("state") != "completed":
        raise typer.Exit(1)


def parse_settings(pairs: list[str], declared: ConfigValues) -> ConfigValues:
    """`key=value` pairs; a value is text where the app declares text, else a number or boolean if it looks like one.

    Raises:
        ConfigError: a pair without `=`.
    """
    split = [_pair("--set", p) for p in pairs]
    return {key: value if isinstance(declared.get(key), str) else _scalar(value) for key, value in split}


def parse_options(option: str, text: str, kind: type[BaseModel]) -> dict[str, Any]:
    """`a=1,b=x+y` as the fields of `kind` (a list takes `+`), checked before anything is sent.

    Raises:
        ConfigError: a field that does not exist, or a value that it does not take.
    """
    fields: dict[str, Any] = {}
    for key, value in (_pair(option, p) for p in text.split(",") if p):
        if key not in kind.model_fields:
            raise ConfigError(option, f"has no {key!r}", f"There are: {', '.join(kind.model_fields)}")
        is_list = kind.model_fields[key].annotation == list[str]
        fields[key] = value.split("+") if is_list else value
    try:
        return kind.model_validate(fields).model_dump(mode="json", exclude_unset=True) if fields else {}
    except ValidationError as exc:
        first = exc.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise ConfigError(f"{option} {where}".strip(), first["msg"].removeprefix("Value error, ")) from exc


def parse_labels(text: str) -> dict[str, str]:
    """`a=b,c=d` as a selector."""
    return dict(_pair("--nodes", p) for p in text.split(",") if p)


def _pair(option: str, text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise ConfigError(option, f"{text!r} is not key=value")
    return key.strip(), value.strip()


def _scalar(text: str) -> Scalar:
    if text in ("true", "false"):
        return text == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text.strip("\"'")
