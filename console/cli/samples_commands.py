"""`fedtide samples ...`: what a node kept of its requests. Only counts and labels cross the network; no sample does."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from pydantic import AwareDatetime, TypeAdapter, ValidationError

from fedtide.console import endpoints
from fedtide.console.cli.grammar import read_text
from fedtide.console.client import Client
from fedtide.console.output import Format, Output, say, show_list
from fedtide.fabric.errors import ConfigError
from fedtide.fabric.messages.requests import ForgetRequest, LabelsRequest
from fedtide.fabric.validation import config_error

samples_app = typer.Typer(no_args_is_help=True, help="Samples that a node captured: counts, labels, deletion.")

Node = Annotated[str, typer.Argument(help="Name of a node")]
Model = Annotated[str, typer.Option("--model")]
_TIME: TypeAdapter[AwareDatetime] = TypeAdapter(AwareDatetime)


@samples_app.command("ls")
def ls(node: Node, output: Output = Format.table) -> None:
    """How many samples of each model a node has."""
    view = Client.find().send(endpoints.samples(node))
    rows = [{"model": model, **counts.model_dump()} for model, counts in view.models.items()]
    show_list([view], rows, output)


@samples_app.command("label")
def label(
    node: Node, model: Model, file: Annotated[Path, typer.Argument(help='JSON: {"<request id>": label, ...}')]
) -> None:
    """Give captured samples their labels."""
    try:
        labels = LabelsRequest.model_validate_json(f'{{"labels": {read_text(file)}}}')
    except ValidationError as exc:
        raise config_error(exc, LabelsRequest, str(file)) from exc
    matched = Client.find().send(endpoints.label_samples(node, model, labels))
    say(f"{matched.matched} of {matched.received} labels belong to samples of {node}")


@samples_app.command("forget")
def forget(
    node: Node,
    model: Model,
    id_: Annotated[str | None, typer.Option("--id", help="One request")] = None,
    before: Annotated[str | None, typer.Option("--before", help="Only older ones, e.g. 2026-01-31T00:00:00Z")] = None,
) -> None:
    """Delete samples of a model from a node: one, old ones, or all."""
    try:
        limit = _TIME.validate_python(before) if before is not None else None
    except ValidationError as exc:
        raise ConfigError("--before", f"{before!r} is no time", "Write it as 2026-01-31T00:00:00Z") from exc
    gone = Client.find().send(endpoints.forget_samples(node, model, ForgetRequest(id=id_, before=limit)))
    say(f"{gone.deleted} samples deleted")
