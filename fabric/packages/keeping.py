"""Environments on disk: one process makes one, those in use stay, and those unused for longest make room.

Locks are files beside them, so several processes may share a folder: `NAME` is held (shared) by who uses an
environment, `NAME.making` by who makes it, `cache` (shared) by whoever installs.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from fedtide.fabric.packages.rules import PackageRules

CACHE = ".uv-cache"
_LOCKS = ".locks"


def hold(python: Path) -> int:
    """Keep an environment from being removed, until the handle is closed or the process ends.

    Not inherited by what the process starts.
    """
    handle = os.open(_lock_file(python.parent.parent), os.O_RDWR | os.O_CREAT, 0o644)
    fcntl.flock(handle, fcntl.LOCK_SH)
    return handle


def make_room(root: Path, rules: PackageRules) -> None:
    """Remove environments that were not used for longest, until the rest fits. What is in use stays."""
    folders = sorted((f for f in root.glob("[0-9a-f]*") if f.is_dir()), key=_last_used)
    if size_of([*folders, root / CACHE]) <= rules.max_bytes:
        return
    with _nobody_has(root / _LOCKS / "cache") as unused:
        if unused:
            shutil.rmtree(root / CACHE, ignore_errors=True)  # what environments share with it stays with them
    for folder in folders:
        if size_of(folders) <= rules.max_bytes:
            return
        with _nobody_has(_making_file(folder)) as made, _nobody_has(_lock_file(folder)) as unused:
            if made and unused:
                shutil.rmtree(folder, ignore_errors=True)


def size_of(folders: Iterable[Path]) -> int:
    """Bytes on disk: a file that is linked from several of them counts once, one that vanishes meanwhile not at all."""
    sizes = {}
    for folder in folders:
        for root, _, names in os.walk(folder):
            for name in names:
                try:
                    found = Path(root, name).lstat()
                except FileNotFoundError:
                    continue
                sizes[found.st_ino] = found.st_blocks * 512
    return sum(sizes.values())


def _last_used(folder: Path) -> float:
    try:
        return folder.stat().st_mtime
    except FileNotFoundError:
        return 0.0


def _lock_file(folder: Path) -> Path:
    locks = folder.parent / _LOCKS
    locks.mkdir(parents=True, exist_ok=True)
    return locks / folder.name


def _making_file(folder: Path) -> Path:
    return _lock_file(folder).with_suffix(".making")


@contextmanager
def making(folder: Path) -> Iterator[None]:
    """One process at a time makes an environment."""
    with _making_file(folder).open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextmanager
def installing(root: Path) -> Iterator[None]:
    """While packages are taken from the cache it stays."""
    with _lock_file(root / "cache").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        yield


@contextmanager
def _nobody_has(lock: Path) -> Iterator[bool]:
    """Whether nobody holds a lock; meanwhile nobody can."""
    with lock.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield False
        else:
            yield True
