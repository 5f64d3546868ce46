"""A process confines itself to what one run may see: the last thing that it does before it loads the app."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from pydantic import Field

from fedtide.edge_agent.sandbox import capabilities, landlock, syscalls
from fedtide.edge_agent.sandbox.users import User, become
from fedtide.edge_agent.sandbox.visible import devices, gpus
from fedtide.fabric.strict import Strict


class Confinement(Strict):
    """What one run may see and do on this node."""

    read: list[Path] = Field(description="Files and folders that it may read")
    write: list[Path] = Field(description="Folders that it may write")
    home: Path = Field(description="Its home, which the runs of its app share")
    network: bool
    gpu: bool = True
    user: User | None = Field(default=None, description="As whom it runs; None: as the agent does")


def enter(allowed: Confinement) -> int | None:
    """Give up everything else, for good, for this process and all that it starts. Only with a single thread.

    Returns:
        The listener that the kernel asks before each new process (`forks`); None: it asks nobody.

    Raises:
        OSError: the kernel does not let it.
    """
    if landlock.abi():
        write = [*allowed.write, allowed.home, *devices(gpu=allowed.gpu)]
        landlock.restrict(allowed.read, write, tcp=allowed.network)
    else:
        landlock.no_new_privileges()
    capabilities.drop_for_good()
    if allowed.user is not None:
        become(allowed.user, (file.stat().st_gid for file in gpus() if allowed.gpu and file.exists()))
    scratch = allowed.home / "tmp"
    scratch.mkdir(parents=True, exist_ok=True)
    os.environ |= {"HOME": str(allowed.home), "TMPDIR": str(scratch)}
    tempfile.tempdir = None  # it is looked for again
    capabilities.drop_held()
    return syscalls.forbid(network=allowed.network)
