"""Files of one machine: written whole or not at all, mapped without reading, and when the disk is full."""

from __future__ import annotations

import errno
import mmap
import os
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path

_NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


def write_atomically(file: Path, parts: bytes | Iterable[bytes | memoryview], *, mode: int = 0o666) -> None:
    """Write a file that is there as a whole or not at all, also after a power cut (fsync, rename, fsync of the folder).

    Args:
        parts: its bytes, or pieces of them in order.
        mode: permissions, before the process's umask.

    Raises:
        OSError: it could not be written; a file of that name is as it was.
    """
    part = file.with_name(f"{file.name}.{os.getpid()}.part")
    part.unlink(missing_ok=True)
    try:
        with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as stream:
            stream.writelines([parts] if isinstance(parts, bytes) else parts)
            stream.flush()
            os.fsync(stream.fileno())
        part.replace(file)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    sync(file.parent)


def keep_caches_in(folder: Path) -> None:
    """Let libraries put what they cache there, in this process and in those that it starts, not into a home folder."""
    os.environ.setdefault("XDG_CACHE_HOME", str((folder / "cache").resolve()))


def sync(path: Path) -> None:
    """Make a file or folder durable."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove_tree(folder: Path) -> None:
    """Remove a folder with all in it, also one that is nested deeper than Python's own function gets.

    Raises:
        OSError: something of it cannot be removed.
    """
    try:
        shutil.rmtree(folder)
    except RecursionError:
        done = subprocess.run(["rm", "-rf", "--", str(folder)], capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise OSError(done.stderr.strip()) from None


def map_file(path: Path) -> memoryview:
    """A file's bytes without reading them into memory (it must not be empty)."""
    with path.open("rb") as file:
        return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))


def is_full(error: BaseException) -> bool:
    """Whether `error` says that there is no room now (also by a quota or a limit on file sizes): waiting helps."""
    return isinstance(error, OSError) and error.errno in _NO_ROOM
