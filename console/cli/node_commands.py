"""`fedtide node ...`: on the node itself, for its owner."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Annotated

import typer

from fedtide.fabric.process.python import module_command

node_app = typer.Typer(no_args_is_help=True, help="On a node itself: what its owner allows.")
policy_app = typer.Typer(no_args_is_help=True, help="The owner's policy of a node.")
node_app.add_typer(policy_app, name="policy")


@policy_app.command("check")
def check(
    file: Annotated[Path, typer.Argument(help="The policy (TOML)")],
    app: Annotated[str, typer.Option(help="What would hold for an app of this name")] = "",
    digest: Annotated[str, typer.Option(help="Of its bundle")] = "",
    publisher: Annotated[str, typer.Option(help="The role that vouches for it, e.g. publisher-al")] = "",
    model: Annotated[str, typer.Option(help="Whether a release of it may be served")] = "",
    apps_user: Annotated[str, typer.Option(help="The agent's setting of this name, if it has one")] = "",
) -> None:
    """What a policy allows on this machine, and what is wrong with it."""
    options = {"--app": app, "--digest": digest, "--publisher": publisher, "--model": model, "--apps-user": apps_user}
    given = [f"{option}={value}" for option, value in options.items() if value]
    # The agent's own words: this package does not know it.
    command = module_command("fedtide.edge_agent.policy_check", *given, "--", str(file))
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    typer.echo(done.stdout, nl=False)
    typer.echo(done.stderr, nl=False, err=True)
    raise typer.Exit(done.returncode)
