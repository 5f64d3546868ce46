"""`fedtide model ...` and `fedtide infer`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedtide.console import endpoints
from fedtide.console.cli.grammar import read_text
from fedtide.console.cli.verbs import shows
from fedtide.console.client import Client
from fedtide.console.output import Format, Limit, Output, Timeout, say, show_list, show_one
from fedtide.fabric.errors import NotFound
from fedtide.fabric.messages.views import ModelView

models_app = typer.Typer(no_args_is_help=True, help="Models and their releases.")


@models_app.command("ls")
def ls(limit: Limit = 1000, output: Output = Format.table) -> None:
    """All models."""
    views = list(Client.find().every(endpoints.models(), limit))
    show_list(views, [_row(view) for view in views], output)


def _row(view: ModelView) -> dict[str, object]:
    last = view.releases[-1] if view.releases else None
    return {
        "model": view.model,
        "latest": view.latest,
        "digest": last.digest[:12] if last is not None else None,
        "metrics": last.metrics if last is not None else {},
        "size_bytes": last.size_bytes if last is not None else None,
    }


@shows(models_app)
def show(model: str, output: Output = Format.table) -> None:
    """One model with all its releases and their lineage."""
    view = Client.find().send(endpoints.model(model))
    if output is not Format.table:
        show_one(view, output)
        return
    rows = [
        {
            "version": r.version,
            "digest": r.digest[:12],
            "app": r.lineage.app.name,
            **r.lineage.model_dump(include={"run", "rounds", "participants", "updates"}),
            "metrics": r.metrics,
        }
        for r in view.releases
    ]
    show_list(view.releases, rows, output)


@models_app.command("pull")
def pull(
    model: str,
    version: Annotated[str, typer.Option("--version", help="A number, or latest")] = "latest",
    file: Annotated[Path | None, typer.Option("--file", help="Default: MODEL.onnx")] = None,
) -> None:
    """Download a release's ONNX file."""
    data = Client.find().send(endpoints.onnx(model, version))
    target = file or Path(f"{model}.onnx")
    target.write_bytes(data)
    say(f"{target}: {len(data)} bytes")


def infer(
    node: Annotated[str, typer.Argument(help="Name of a node")],
    file: Annotated[Path, typer.Argument(help="Open Inference Protocol v2 request (JSON)")],
    model: Annotated[str | None, typer.Option("--model", help="Default: the only one the node serves")] = None,
    timeout: Timeout = 30.0,
) -> None:
    """Send an inference request to a node, through the coordinator."""
    request = read_text(file)
    client = Client.find()
    name = model or _only_one(node, sorted(client.send(endpoints.node(node)).serving))
    call = endpoints.infer(node, name, request.encode(), timeout)
    say(client.send(call, timeout_s=timeout + 10).decode(errors="replace"))


def _only_one(node: str, models: list[str]) -> str:
    if len(models) != 1:
        served = ", ".join(models) or "none"
        raise NotFound(f"node {node} serves {len(models)} models ({served})", "Name one with --model, or roll one out")
    return models[0]
