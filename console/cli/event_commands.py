"""`fedtide events ...`: the log, as it is."""

from __future__ import annotations

import json
from typing import Annotated
from urllib.parse import urlencode

import typer

from fedtide.console.cli.output import Format, Output, cell, show_list
from fedtide.console.client import Client

events_app = typer.Typer(no_args_is_help=True, help="The event log: everything that happened.")

Kind = Annotated[str, typer.Option("--kind", help="Only this kind, e.g. round.closed; a trailing * matches any end")]
About = Annotated[str, typer.Option("--about", help="Only events that name this run, roll-out, node or model")]


@events_app.command("query")
def query(
    kind: Kind = "",
    about: About = "",
    limit: Annotated[int, typer.Option(min=1, max=10_000, help="The newest so many")] = 50,
    output: Output = Format.table,
) -> None:
    """Events, oldest first."""
    path = f"/v1/events?{urlencode({'kind': kind, 'about': about, 'limit': limit})}"
    rows = Client.find().get(path)
    if output is Format.table:
        rows = [
            {**r, "data": {k: v for k, v in r["data"].items() if k != "kind"}, "kind": r["data"]["kind"]} for r in rows
        ]
    show_list(rows, ["time", "kind", "source", "data"], output)


@events_app.command("tail")
def tail(kind: Kind = "", about: About = "", output: Output = Format.table) -> None:
    """New events as they are logged, one a line, until interrupted (`-o json`: one JSON object a line)."""
    for event in Client.find().stream(f"/v1/events/watch?{urlencode({'kind': kind, 'about': about})}"):
        if output is Format.table:
            data = {k: v for k, v in event["data"].items() if k != "kind"}
            typer.echo(f"{event['time'][:23]}  {event['data']['kind']}  {cell(data)}")
        else:
            typer.echo(json.dumps(event))
