"""A backup into the folder of an embedded installation, which is not up meanwhile."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from fedtide.console.embedded.plan import Child, lay_out
from fedtide.console.embedded.supervisor import locked
from fedtide.console.home import Home
from fedtide.fabric.errors import TransientError
from fedtide.fabric.nats.authority import FILE
from fedtide.fabric.nats.backup_file import identity_in, opened
from fedtide.fabric.nats.credentials import write_secret
from fedtide.fabric.process.parent_death import die_with_parent

STARTS_WITHIN_S = 30.0


def restore_home(home: Home, file: Path, put: Callable[[Path], None], at_rest_key: Path | None = None) -> None:
    """Start the hub alone, and put a backup into it.

    Args:
        put: does it, given the coordinator's configuration.

    Raises:
        ConfigError: it is no backup, or the installation is up.
    """
    with locked(home), opened(file) as (archive, contents):
        if not (home.identity / FILE).exists():
            found = identity_in(archive)
            for name in sorted(found, key=lambda name: name == FILE):
                write_secret(home.identity / name, found[name])
        layout = lay_out(home, contents.regions, 1, at_rest_key=at_rest_key)
        with _running(layout.children[0], home.logs / "hub.log"):
            put(home.root / "config" / "coordinator.json")


@contextmanager
def _running(child: Child, logfile: Path) -> Iterator[None]:
    with logfile.open("ab") as stream:
        process = subprocess.Popen(
            child.argv,
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=stream,
            env={**os.environ, **child.environment, "FEDTIDE_LIFELINE_PID": str(os.getpid())},
            preexec_fn=die_with_parent,
        )
    try:
        deadline = time.monotonic() + STARTS_WITHIN_S
        while not _is_open(child.port):
            if process.poll() is not None or time.monotonic() > deadline:
                raise TransientError("the hub does not start", f"See {logfile}")
            time.sleep(0.05)
        yield
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait()


def _is_open(port: int | None) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port or 0)) == 0
