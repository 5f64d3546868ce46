"""`fedtide model ...` and `fedtide infer`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from fedtide.console.cli.output import Format, Output, show_list, show_one
from fedtide.console.client import Client
from fedtide.fabric.errors import ConfigError, NotFound

models_app = typer.Typer(no_args_is_help=True, help="Models and their releases.")


@models_app.command("ls")
def ls(output: Output = Format.table) -> None:
    """All models."""
    rows = Client.find().get("/v1/models")
    if output is Format.table:
        rows = [{**r, **_latest(r["releases"])} for r in rows]
    show_list(rows, ["model", "latest", "digest", "metrics", "size_bytes"], output)


def _latest(releases: list[dict[str, object]]) -> dict[str, object]:
    return {**releases[-1], "digest": str(releases[-1]["digest"])[:12]} if releases else {}


@models_app.command("show")
def show(model: str, output: Output = Format.table) -> None:
    """One model with all its releases and their lineage."""
    view = Client.find().get(f"/v1/models/{model}")
    if output is not Format.table:
        show_one(view, output)
        return
    rows = [
        {**r, "digest": r["digest"][:12], **r["lineage"], "app": r["lineage"]["app"]["name"]} for r in view["releases"]
    ]
    show_list(rows, ["version", "digest", "app", "run", "rounds", "participants", "updates", "metrics"], output)


@models_app.command("pull")
def pull(
    model: str,
    version: Annotated[str, typer.Option("--version", help="A number, or latest")] = "latest",
    file: Annotated[Path | None, typer.Option("--file", help="Default: MODEL.onnx")] = None,
) -> None:
    """Download a release's ONNX file."""
    target = file or Path(f"{model}.onnx")
    data = Client.find().call("GET", f"/v1/models/{model}/versions/{version}/onnx")
    target.write_bytes(data)
    typer.echo(f"{target}: {len(data)} bytes")


def infer(
    node: Annotated[str, typer.Argument(help="Name of a node")],
    file: Annotated[Path, typer.Argument(help="Open Inference Protocol v2 request (JSON)")],
    model: Annotated[str | None, typer.Option("--model", help="Default: the only one the node serves")] = None,
) -> None:
    """Send an inference request to a node."""
    try:
        request = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as exc:
        raise ConfigError(str(file), f"is not a JSON request: {exc}") from exc
    view = Client.find().get(f"/v1/nodes/{node}")
    name = model or _only_one(node, sorted(view["serving"]))
    if not view["inference_url"]:
        raise NotFound(f"node {node} has no inference server")
    typer.echo(json.dumps(Client(view["inference_url"]).post(f"/v2/models/{name}/infer", request), indent=2))


def _only_one(node: str, models: list[str]) -> str:
    if len(models) != 1:
        served = ", ".join(models) or "none"
        raise NotFound(f"node {node} serves {len(models)} models ({served})", "Name one with --model, or roll one out")
    return models[0]
