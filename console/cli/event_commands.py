"""`fedtide events ...`: the log, as sentences."""

from __future__ import annotations

from typing import Annotated

import typer

from fedtide.console import endpoints
from fedtide.console.client import Client
from fedtide.console.output import Format, Output, say, show_list
from fedtide.fabric.messages.views import EventView

events_app = typer.Typer(no_args_is_help=True, help="The event log: everything that happened.")

Kind = Annotated[str, typer.Option("--kind", help="Only this kind, e.g. round.closed; a trailing * matches any end")]
About = Annotated[str, typer.Option("--about", help="Only events about this run, roll-out, node, model or rule")]


@events_app.command("ls")
@events_app.command("query")
def query(
    kind: Kind = "",
    about: About = "",
    limit: Annotated[int, typer.Option(min=1, max=10_000, help="Number of newest events to show")] = 50,
    output: Output = Format.table,
) -> None:
    """Events, oldest first: a line each, or whole with `-o json`."""
    views = Client.find().send(endpoints.events(kind=kind, about=about, limit=limit)).items
    if output is not Format.table:
        show_list(views, [], output)
        return
    for view in views:
        say(_line(view))


@events_app.command("watch")
@events_app.command("tail")
def tail(kind: Kind = "", about: About = "", output: Output = Format.table) -> None:
    """New events as they are logged, one a line, until interrupted (`-o json`: one JSON object a line)."""
    for view in Client.find().stream(endpoints.watch_events(kind, about)):
        say(_line(view) if output is Format.table else view.model_dump_json())


def _line(view: EventView) -> str:
    return f"{view.time:%Y-%m-%dT%H:%M:%S}.{view.time.microsecond // 1000:03d}Z  {view.kind:<24}  {view.what}"
