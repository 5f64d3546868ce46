"""Environments on disk: one process makes one, those in use stay, and those unused for longest make room."""

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

    It is inherited by what the process becomes, not by what it starts.
    """
    folder = python.parent.parent
    handle = os.open(_lock_file(folder), os.O_RDWR | os.O_CREAT, 0o644)
    fcntl.flock(handle, fcntl.LOCK_SH)
    return handle


def make_room(root: Path, rules: PackageRules) -> None:
    """Remove environments that were not used for longest, until the rest fits. What is in use stays."""
    folders = sorted((f for f in root.glob("[0-9a-f]*") if f.is_dir()), key=lambda f: f.stat().st_mtime)
    if size_of([*folders, root / CACHE]) <= rules.max_bytes:
        return
    shutil.rmtree(root / CACHE, ignore_errors=True)  # what environments share with it stays with them
    for folder in folders:
        if size_of(folders) <= rules.max_bytes:
            return
        with _unused(folder) as unused:
            if unused:
                shutil.rmtree(folder, ignore_errors=True)


def size_of(folders: Iterable[Path]) -> int:
    """Bytes on disk: a file that is linked from several of them counts once."""
    sizes = {}
    for folder in folders:
        for root, _, names in os.walk(folder):
            for name in names:
                found = Path(root, name).lstat()
                sizes[found.st_ino] = found.st_blocks * 512
    return sum(sizes.values())


def _lock_file(folder: Path) -> Path:
    locks = folder.parent / _LOCKS
    locks.mkdir(parents=True, exist_ok=True)
    return locks / folder.name


@contextmanager
def making(folder: Path) -> Iterator[None]:
    """One process at a time makes an environment."""
    with (_lock_file(folder).with_suffix(".making")).open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextmanager
def _unused(folder: Path) -> Iterator[bool]:
    """Whether nobody holds an environment; meanwhile nobody can."""
    with _lock_file(folder).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield False
        else:
            yield True
