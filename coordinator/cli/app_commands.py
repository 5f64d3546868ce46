"""`fedtide app ...`: apps as the coordinator keeps them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from coordinator.cli.client import Client
from fabric.apps import bundle, describe

apps_app = typer.Typer(no_args_is_help=True, help="Flower apps.")


@apps_app.command("push")
def push(app: Annotated[Path, typer.Argument(help="Folder of the app")]) -> None:
    """Give an app to the coordinator; prints `spec.app` of a FederatedRun."""
    import yaml

    ref = json.loads(Client.find().call("PUT", "/v1/bundles", bundle(app)))
    named = {"name": describe(app).name, "bundle": {"digest": ref["digest"], "sizeBytes": ref["size_bytes"]}}
    typer.echo(yaml.safe_dump({"app": named}, sort_keys=False), nl=False)
