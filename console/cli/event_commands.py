"""`fedtide events ...`: the log, as sentences."""

from __future__ import annotations

from typing import Annotated

import typer

from fedtide.console import endpoints
from fedtide.console.client import Client
from fedtide.console.output import Format, Output, say, show_list
from fedtide.fabric.errors import ConfigError
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


@events_app.command("parked")
def parked(
    retry: Annotated[str, typer.Option(metavar="ID|all", help="Try it again")] = "",
    drop: Annotated[str, typer.Option(metavar="ID|all", help="Forget it")] = "",
    output: Output = Format.table,
) -> None:
    """Reports that could not be applied and commands that could not be carried out, each with its reason.

    An event of the log that this version cannot apply is shown too; only another version helps.
    """
    if retry and drop:
        raise ConfigError("--drop", "cannot be combined with --retry")
    client = Client.find()
    views = list(client.every(endpoints.parked()))
    wanted = retry or drop
    if wanted:
        call = endpoints.retry_parked if retry else endpoints.drop_parked
        named = [v.id for v in views if v.kind != "event"] if wanted == "all" else [wanted]
        views = [client.send(call(each)) for each in named]
    rows = [{"id": v.id, "kind": v.kind, "at": v.at, "about": v.subject, "reason": v.reason} for v in views]
    show_list(views, rows, output)


def _line(view: EventView) -> str:
    return f"{view.time:%Y-%m-%dT%H:%M:%S}.{view.time.microsecond // 1000:03d}Z  {view.kind:<24}  {view.what}"
