"""`fedtide backup` and `fedtide restore`: the log, the registry, identities and all that belongs to them, as a file."""

from __future__ import annotations

import os
import subprocess
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from fedtide.console.home import TENANT, Home
from fedtide.console.output import say
from fedtide.fabric.errors import ConfigError, FedtideError
from fedtide.fabric.nats.backup_store import BackupStore, is_url
from fedtide.fabric.process.python import module_command
from fedtide.fabric.trust.installation import RELEASES_KEY

Config = Annotated[
    Path | None, typer.Option("--config", help="The coordinator's configuration; default: that of `fedtide up`")
]


class BackupFailed(FedtideError):
    """What the process that does it has said last."""

    def __init__(self, what: str, code: int) -> None:
        super().__init__(what)
        self.exit_code = code


def backup(
    file: Annotated[str, typer.Argument(help="A file, or s3://BUCKET/FOLDER/; whoever reads it is the coordinator")],
    config: Config = None,
    keep: Annotated[int | None, typer.Option(min=1, help="Remove older ones from a URL that ends with /")] = None,
) -> None:
    """Copy a running installation into one file: log, registry, releases, runs, identities. Not what regions cache."""
    _check_whole()
    _run("save", config or _own_config(), file, *(["--keep", str(keep)] if keep else []))


def restore(
    file: Annotated[str, typer.Argument(help="A backup: a file or a URL; the newest, if it ends with /")],
    config: Config = None,
    replace: Annotated[bool, typer.Option("--replace", help="Delete the log that the hub holds")] = False,
    at_rest_key: Annotated[Path | None, typer.Option(help="As for `fedtide up`")] = None,
) -> None:
    """Put a backup into a hub while no coordinator runs; without --config into this home, for the next `fedtide up`."""
    _check_whole()
    more = ["--replace"] if replace else []
    if config is not None:
        _run("restore", config, file, *more)
        return
    from fedtide.console.embedded.restoring import restore_home

    with tempfile.TemporaryDirectory() as scratch:
        local = Path(file).absolute()
        if is_url(file):
            local = Path(scratch) / "backup.tar"
            BackupStore(file).fetch(local)
        home = Home.find()
        restore_home(home, local, lambda made: _run("restore", made, str(local), *more), at_rest_key)
    if not (home.release_authority / RELEASES_KEY).exists():
        say(
            f"the key that vouches for releases is in no backup: put {home.release_authority} of the old home back, "
            "or sign releases yourself (fedtide model sign)"
        )


def _own_config() -> Path:
    home = Home.find()
    home.state()
    return home.root / "config" / "coordinator.json"


def _check_whole() -> None:
    if os.environ.get(TENANT):
        raise ConfigError(TENANT, "is set, and a backup is of the whole installation", "Unset it")


def _run(verb: str, config: Path, target: str, *more: str) -> None:
    named = target if is_url(target) else str(_checked(verb, Path(target).absolute()))
    command = module_command("fedtide.coordinator.backup", verb, str(config), named, *more)
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"ended with code {done.returncode}"]
        raise BackupFailed(said[-1], done.returncode)
    say(done.stdout.strip())


def _checked(verb: str, file: Path) -> Path:
    """Raises ConfigError for a file that cannot be read or written: before a process is started for it."""
    try:
        if verb == "restore" and not file.is_file():
            raise ConfigError(str(file), "is no file", "Name a backup: a file, or a URL of an object store")
        if verb == "save" and (file.is_dir() or not os.access(file.parent, os.W_OK)):
            raise ConfigError(str(file), "cannot be written", "Name a file in a folder that is there")
    except (OSError, ValueError) as exc:
        raise ConfigError("file", f"is no name of a file: {exc}") from exc
    return file
