"""`fedtide backup` and `fedtide restore`: the log, the registry, identities and all that belongs to them, as a file."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer

from fedtide.console.home import Home
from fedtide.console.output import say
from fedtide.fabric.errors import FedtideError

Config = Annotated[
    Path | None, typer.Option("--config", help="The coordinator's configuration; default: that of `fedtide up`")
]


class BackupFailed(FedtideError):
    """What the process that does it has said last."""

    def __init__(self, what: str, code: int) -> None:
        super().__init__(what)
        self.exit_code = code


def backup(
    file: Annotated[Path, typer.Argument(help="Where it is written; whoever can read it is the coordinator")],
    config: Config = None,
) -> None:
    """Copy a running installation into one file: log, registry, releases, runs, identities. Not what regions cache."""
    _run("save", config or _own_config(), file)


def restore(
    file: Annotated[Path, typer.Argument(help="A backup", exists=True)],
    config: Config = None,
    replace: Annotated[bool, typer.Option("--replace", help="Delete the log that the hub holds")] = False,
    at_rest_key: Annotated[Path | None, typer.Option(help="As for `fedtide up`")] = None,
) -> None:
    """Put a backup into a hub while no coordinator runs; without --config into this home, for the next `fedtide up`."""
    more = ["--replace"] if replace else []
    if config is not None:
        _run("restore", config, file, *more)
        return
    from fedtide.console.embedded.restoring import restore_home

    restore_home(Home.find(), file.absolute(), lambda made: _run("restore", made, file, *more), at_rest_key)


def _own_config() -> Path:
    home = Home.find()
    home.state()
    return home.root / "config" / "coordinator.json"


def _run(verb: str, config: Path, file: Path, *more: str) -> None:
    command = [sys.executable, "-m", "fedtide.coordinator.backup", verb, str(config), str(file.absolute()), *more]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"ended with code {done.returncode}"]
        raise BackupFailed(said[-1], done.returncode)
    say(done.stdout.strip())
