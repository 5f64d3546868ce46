"""`fedtide fleet ...`."""

from __future__ import annotations

import typer

from coordinator.cli.client import Client
from coordinator.cli.output import Format, Output, megabytes, show_list, show_one

fleet_app = typer.Typer(no_args_is_help=True, help="The nodes of the fleet.")


@fleet_app.command("ls")
def ls(output: Output = Format.table) -> None:
    """All nodes, with what they serve and do."""
    rows = Client.find().get("/v1/nodes")
    if output is Format.table:
        rows = [
            {**r, "memory": megabytes(r["rss_bytes"]), "serving": {m: d[:12] for m, d in r["serving"].items()}}
            for r in rows
        ]
    show_list(rows, ["name", "region", "state", "cpus", "extras", "memory", "serving", "busy", "reason"], output)


@fleet_app.command("show")
def show(node: str, output: Output = Format.table) -> None:
    """One node."""
    show_one(Client.find().get(f"/v1/nodes/{node}"), output)
