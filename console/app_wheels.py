"""Collects the wheels of what an app needs, for the machines that are to run it: they need no package index then."""

from __future__ import annotations

import platform
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from fedtide.fabric.errors import CapabilityMissing, ConfigError, FedtideError
from fedtide.fabric.flower.apps import MAX_BUNDLE_BYTES
from fedtide.fabric.process.python import module_command

NEWEST_GLIBC, OLDEST_GLIBC = 41, 17
"""The manylinux tags that are tried: 2.41 (2025) down to 2.17 (PEP 599)."""


class WheelsMissing(FedtideError):
    """pip found no wheels of what an app needs."""


@dataclass(frozen=True, slots=True, order=True)
class Machine:
    """What decides which wheels fit: `python` is `3.11`, `hardware` the machine type, e.g. `aarch64`."""

    python: str
    hardware: str

    @classmethod
    def this(cls) -> Machine:
        """The one that this process runs on."""
        return cls(f"{sys.version_info[0]}.{sys.version_info[1]}", platform.machine())


@contextmanager
def gathered(app: Path, dependencies: Iterable[str], machines: Iterable[Machine]) -> Iterator[list[Path]]:
    """The wheels of what an app needs and what that needs, without what every node has.

    Raises:
        CapabilityMissing: no pip here.
        WheelsMissing: there is no wheel for one of the machines.
        ConfigError: a requirement cannot be read, or a wheel is too large to travel.
    """
    from fedtide.fabric.packages.environment import asked_for
    from fedtide.fabric.packages.requirements import WITH_FLOWER, name_of, unmet

    asked = [each for each in asked_for(app, tuple(dependencies)) if name_of(each) not in WITH_FLOWER or unmet([each])]
    kept = WITH_FLOWER - {name_of(each) for each in asked}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        for machine in sorted(set(machines)) if asked else []:
            _download(asked, machine, folder)
        wheels = [file for file in sorted(folder.glob("*.whl")) if name_of(file.name.partition("-")[0]) not in kept]
        for file in wheels:
            if (size := file.stat().st_size) > MAX_BUNDLE_BYTES:
                raise ConfigError(
                    "--with-wheels",
                    f"{file.name} has {size / 1e6:.0f} MB, more than {MAX_BUNDLE_BYTES // 2**20} MiB",
                    "Install it on the nodes, or let them use an index (packages.index)",
                )
        yield wheels


def _download(asked: list[str], machine: Machine, folder: Path) -> None:
    """pip as it is set up here says from where. For this machine it may build wheels, for others it takes what is."""
    command = module_command("pip", "wheel", "--wheel-dir", str(folder))
    if machine != Machine.this():
        tags = [f"manylinux_2_{minor}_{machine.hardware}" for minor in range(NEWEST_GLIBC, OLDEST_GLIBC - 1, -1)]
        command = module_command("pip", "download", "--dest", str(folder), "--only-binary=:all:")
        command += ["--python-version", machine.python, "--implementation", "cp"]
        command += [f"--platform={tag}" for tag in [*tags, f"manylinux2014_{machine.hardware}"]]
    done = subprocess.run([*command, "-q", *asked], capture_output=True, text=True, check=False)
    if "No module named pip" in done.stderr:
        raise CapabilityMissing("--with-wheels needs pip in this environment", "python -m ensurepip")
    if done.returncode != 0:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or done.stderr.splitlines()
        raise WheelsMissing(
            f"no wheels for Python {machine.python} on {machine.hardware}: {' '.join(errors)[-1000:]}",
            "Ask for versions that have wheels for these machines, or narrow the nodes",
        )
