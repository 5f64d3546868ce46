"""`fedtide node ...`: on the node itself, for its owner."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer

node_app = typer.Typer(no_args_is_help=True, help="On a node itself: what its owner allows.")
policy_app = typer.Typer(no_args_is_help=True, help="The owner's policy of a node.")
node_app.add_typer(policy_app, name="policy")


@policy_app.command("check")
def check(
    file: Annotated[Path, typer.Argument(help="The policy (TOML)")],
    app: Annotated[str, typer.Option(help="What would hold for an app of this name")] = "",
    digest: Annotated[str, typer.Option(help="Of its bundle")] = "",
    model: Annotated[str, typer.Option(help="Whether a release of it may be served")] = "",
) -> None:
    """What a policy allows on this machine, and what is wrong with it."""
    options = {"--app": app, "--digest": digest, "--model": model}
    given = [part for option, value in options.items() if value for part in (option, value)]
    # The agent's own words: this package does not know it.
    module = [sys.executable, "-m", "fedtide.edge_agent.policy_check"]
    raise typer.Exit(subprocess.run([*module, str(file), *given], check=False).returncode)
