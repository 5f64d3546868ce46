"""A backup into the folder of an embedded installation, which is not up meanwhile."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from fedtide.console.embedded.plan import lay_out
from fedtide.console.embedded.supervisor import locked, running
from fedtide.console.home import Home
from fedtide.fabric.nats.authority import FILE
from fedtide.fabric.nats.backup_file import opened, unpack_identity


def restore_home(home: Home, file: Path, put: Callable[[Path], None], at_rest_key: Path | None = None) -> None:
    """Start the hub alone, and put a backup into it.

    Args:
        put: does it, given the coordinator's configuration.

    Raises:
        ConfigError: it is no backup, or the installation is up.
        ChildGaveUp: the hub does not start.
    """
    with locked(home), opened(file) as (archive, contents):
        if not (home.identity / FILE).exists():
            unpack_identity(archive, home.identity)
        layout = lay_out(home, contents.regions, 1, at_rest_key=at_rest_key)

        async def restore() -> None:
            async with running(home, replace(layout, children=layout.children[:1])):
                await asyncio.to_thread(put, home.root / "config" / "coordinator.json")

        asyncio.run(restore())
