"""`fedtide why ...`."""

from __future__ import annotations

from typing import Annotated
from urllib.parse import quote

import typer

from fedtide.console.cli.output import Format, Output, show_one
from fedtide.console.client import Client


def why(
    name: Annotated[str, typer.Argument(help="A run, one of its rounds as RUN/NUMBER, or a node")],
    limit: Annotated[int, typer.Option(min=1, max=1000, help="The newest so many events")] = 40,
    output: Output = Format.table,
) -> None:
    """Why something is as it is: the present state, then the events that led to it."""
    run, _, number = name.partition("/")
    path = f"/v1/why/{quote(run, safe='')}?limit={limit}" + (f"&round={quote(number)}" if number else "")
    view = Client.find().get(path)
    if output is not Format.table:
        show_one(view, output)
        return
    first, *rest = view["present"]
    typer.echo(f"{name}: {first}")
    for line in rest:
        typer.echo(f"  {line}")
    for step in view["because"]:
        typer.echo(f"{step['at'][:23]}  {step['what']}  ({step['event']})")
