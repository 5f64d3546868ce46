"""Which files an app may see. Pure but for looking at folders."""

from __future__ import annotations

import os
import sys
from collections.abc import Collection, Iterator
from pathlib import Path

SYSTEM = tuple(map(Path, ("/bin", "/lib", "/lib32", "/lib64", "/opt", "/proc", "/sbin", "/sys", "/usr")))
_ETC = (
    "ca-certificates",
    "fonts",
    "gai.conf",
    "group",
    "host.conf",
    "hosts",
    "ld.so.cache",
    "ld.so.conf",
    "ld.so.conf.d",
    "localtime",
    "machine-id",
    "mime.types",
    "nsswitch.conf",
    "OpenCL",
    "passwd",
    "pki",
    "protocols",
    "resolv.conf",
    "services",
    "ssl",
    "timezone",
    "vulkan",
)
_DEVICES = ("null", "zero", "full", "random", "urandom", "tty", "shm")


def system() -> list[Path]:
    """What programs need to run at all: libraries, this interpreter with its packages, names and certificates."""
    names = [Path("/etc", name) for name in _ETC]
    # A resolver's files may be elsewhere, and links lead there.
    real = [path.resolve() for path in names if path.is_symlink()]
    return [*SYSTEM, *names, *real, *interpreter()]


def interpreter() -> list[Path]:
    """Where this interpreter and what it imports are."""
    found = {Path(sys.prefix), Path(sys.base_prefix), *(Path(entry) for entry in sys.path if entry)}
    return sorted({*found, *(path.resolve() for path in found)})


def package() -> list[Path]:
    """Where fedtide itself is: beside the interpreter's packages, if it was installed from its sources."""
    root = Path(__file__).parents[2]
    return sorted({root, root.resolve(), *(entry.resolve() for entry in root.iterdir() if entry.is_dir())})


_GPUS = ("dri", "kfd", "dxg")


def gpus() -> list[Path]:
    """Devices of GPUs, there or not."""
    return [*(Path("/dev", name) for name in _GPUS), *sorted(Path("/dev").glob("nvidia*"))]


def devices(*, gpu: bool = True) -> list[Path]:
    """What an app may write to, or ask, below /dev."""
    found = [Path("/dev", name) for name in _DEVICES]
    return [*found, *gpus()] if gpu else found


def all_but(hidden: Collection[Path], root: Path = Path("/")) -> Iterator[Path]:
    """Paths that together hold all below `root` but what is hidden. What comes later beside those is not seen."""
    there = {path.resolve() for path in hidden}
    try:
        entries = sorted(os.scandir(root), key=lambda entry: entry.name)
    except OSError:
        return
    for entry in entries:
        path = Path(entry.path)
        if path in there or entry.is_symlink():
            continue
        if any(path in each.parents for each in there):
            yield from all_but(there, path)
        else:
            yield path
