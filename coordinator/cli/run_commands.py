"""`fedtide run ...` and `fedtide round ...`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from coordinator.cli.client import Client
from coordinator.cli.output import Format, Output, show_list, show_one
from fabric.errors import ConfigError, NotFound
from fabric.wire import ConfigValues, Scalar

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
    watch: Watch = False,
    output: Output = Format.table,
) -> None:
    """Start a federated run of a Flower app."""
    from fabric.apps import bundle, describe, fuse

    described = describe(app)
    overrides = parse_settings(settings or [], described.config)
    if rounds is not None and "num-server-rounds" in described.config:
        overrides.setdefault("num-server-rounds", rounds)
    fuse(described.config, overrides)
    client = Client.find()
    reference = {"name": described.name, "bundle": json.loads(client.call("PUT", "/v1/bundles", bundle(app)))}
    request = {
        "app": reference,
        "model": model or described.model,
        "rounds": rounds,
        "run_config": overrides,
        "selector": parse_labels(nodes),
        "base": base,
        "round_timeout_s": timeout,
    }
    _started(client, client.post("/v1/runs", request), watch, output)


@rounds_app.command("trigger")
def trigger(
    target: Annotated[str, typer.Argument(help="A model of the registry, or a Flower app directory")],
    region: Annotated[str | None, typer.Option("--region", help="Only nodes of this region")] = None,
    watch: Watch = False,
    output: Output = Format.table,
) -> None:
    """One more round: of a model, from its latest release; or the first round of an app."""
    selector = f"region={region}" if region is not None else ""
    if Path(target).is_dir():
        start(Path(target), rounds=1, nodes=selector, watch=watch, output=output)
        return
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
        _follow(client, view["run"])
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

    from coordinator.cli.watching import draw_run

    Console().print(draw_run(view))


@runs_app.command("watch")
def watch_run(run: str) -> None:
    """Follow a run to its end; exit code 1 if it does not complete."""
    _follow(Client.find(), run)


@runs_app.command("cancel")
def cancel(run: str, output: Output = Format.table) -> None:
    """End a run; its nodes stop their tasks."""
    view = Client.find().post(f"/v1/runs/{run}/cancel", {})
    if output is Format.table:
        typer.echo(f"{run} {view['state']}")
    else:
        show_one(view, output)


def _follow(client: Client, run: str) -> None:
    from coordinator.cli.watching import draw_run, follow, run_lines

    last = follow(client.stream(f"/v1/runs/{run}/watch"), draw_run, run_lines)
    if last.get("state") != "completed":
        raise typer.Exit(1)


def parse_settings(pairs: list[str], declared: ConfigValues) -> ConfigValues:
    """`key=value` pairs; a value is text where the app declares text, else a number or boolean if it looks like one.

    Raises:
        ConfigError: a pair without `=`.
    """
    split = [_pair("--set", p) for p in pairs]
    return {key: value if isinstance(declared.get(key), str) else _scalar(value) for key, value in split}


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
