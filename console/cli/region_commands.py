"""`fedtide region ...`."""

from __future__ import annotations

import typer

from fedtide.console import endpoints
from fedtide.console.cli.verbs import removes
from fedtide.console.client import Client
from fedtide.console.output import Format, Limit, Output, say, show_list

regions_app = typer.Typer(no_args_is_help=True, help="Regions: `fleet region` makes credentials for their servers.")


@regions_app.command("ls")
def ls(limit: Limit = 1000, output: Output = Format.table) -> None:
    """All regions, and when the credentials of their servers expire."""
    views = list(Client.find().every(endpoints.regions(), limit))
    show_list(views, [view.model_dump() for view in views], output)


@removes(regions_app, also="remove")
def remove(region: str) -> None:
    """Forget a region that is gone for good, with its nodes. Take it out of the coordinator's `regions` as well."""
    Client.find().send(endpoints.remove_region(region))
    say(f"removed {region}")
