"""The packages of an app in the aggregator: it takes another interpreter's place if its own lacks some."""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path
from tempfile import mkdtemp
from typing import NoReturn

from fedtide.aggregation.config import WorkerConfig
from fedtide.aggregation.link.grid_link import GridLink
from fedtide.fabric.flower.apps import describe, unpack
from fedtide.fabric.packages.environment import INSIDE, environment_for
from fedtide.fabric.packages.keeping import make_room
from fedtide.fabric.packages.rules import Wanted
from fedtide.fabric.packages.wheels import fitting
from fedtide.fabric.process.python import module_command

log = logging.getLogger(__name__)


def app_dir(config: WorkerConfig) -> Path:
    """Where the app of the run is unpacked."""
    return config.work_dir / "app"


def python_for(config: WorkerConfig, bundle: bytes, link: GridLink) -> Path | None:
    """Unpack the app; returns the interpreter that has what it needs, or None: this one has.

    Raises:
        CapabilityMissing, ConfigError, TransientError: as `environment.environment_for`.
    """
    app, folder = config.spec.app, app_dir(config)
    unpack(bundle, folder)
    root = (config.packages.folder or config.work_dir / "environments").resolve()
    wanted = Wanted(
        root=root,
        rules=config.packages,
        app_dir=folder,
        dependencies=describe(folder).dependencies,
        wheels={name: ref.digest for name, ref in app.wheels.items()},
    )
    scratch: list[Path] = []

    def fetch() -> Path:
        scratch.append(Path(mkdtemp(dir=config.work_dir)))
        for name in fitting(list(app.wheels)):
            (scratch[0] / name).write_bytes(link.call(link.storage.fetch(app.wheels[name])))
        return scratch[0]

    try:
        found = environment_for(wanted, fetch)
        if found is None:
            return None
        os.set_inheritable(found.handle, True)  # for this process's next life
        make_room(root, config.packages)
        return found.python
    finally:
        for each in scratch:
            shutil.rmtree(each, ignore_errors=True)


def become(python: Path, file: Path) -> NoReturn:
    """Be the aggregator of the same attempt in another interpreter: same process, its libraries loaded anew."""
    log.info("aggregator.goes_over", extra={"python": str(python)})
    command = module_command("fedtide.aggregation", str(file), python=python)
    os.execve(python, command, {**os.environ, INSIDE: "1"})
