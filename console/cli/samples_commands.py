"""`fedtide samples ...`: what a node kept of its requests. Asked of the node itself; nothing of it leaves."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import quote, urlencode

import typer

from fedtide.console.cli.output import Format, Output, show_list
from fedtide.console.client import Client
from fedtide.fabric.errors import ConfigError, NotFound

samples_app = typer.Typer(no_args_is_help=True, help="Samples that a node captured: counts, labels, deletion.")

Node = Annotated[str, typer.Argument(help="Name of a node")]


def _node(node: str) -> Client:
    url = Client.find().get(f"/v1/nodes/{node}")["inference_url"]
    if not url:
        raise NotFound(f"node {node} has no inference server")
    return Client(url)


@samples_app.command("ls")
def ls(node: Node, output: Output = Format.table) -> None:
    """How many samples of each model a node has."""
    counts: dict[str, dict[str, Any]] = _node(node).get("/v2/samples")
    rows = [{"model": model, **told} for model, told in counts.items()]
    show_list(rows, ["model", "samples", "labelled", "bytes"], output)


@samples_app.command("label")
def label(
    node: Node,
    model: Annotated[str, typer.Option("--model")],
    file: Annotated[Path, typer.Argument(help='JSON: {"<request id>": label, ...}')],
) -> None:
    """Give captured samples their labels."""
    try:
        labels = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as exc:
        raise ConfigError(str(file), f"is not JSON: {exc}") from exc
    told = _node(node).post(f"/v2/models/{quote(model, safe='')}/labels", {"labels": labels})
    typer.echo(f"{told['matched']} of {told['received']} labels belong to samples of {node}")


@samples_app.command("forget")
def forget(
    node: Node,
    model: Annotated[str, typer.Option("--model")],
    id_: Annotated[str | None, typer.Option("--id", help="One request")] = None,
    before: Annotated[datetime | None, typer.Option("--before", help="Only older ones")] = None,
) -> None:
    """Delete samples of a model from a node: one, old ones, or all."""
    query = {"id": id_, "before": None if before is None else before.timestamp()}
    told = {key: value for key, value in query.items() if value is not None}
    answer = _node(node).call("DELETE", f"/v2/models/{quote(model, safe='')}/samples?{urlencode(told)}")
    typer.echo(answer.decode())
