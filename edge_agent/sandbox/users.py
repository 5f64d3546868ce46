"""Apps as a user of their own: what the kernel keeps from other users it then keeps from them too."""

from __future__ import annotations

import ctypes
import itertools
import os
import pwd
from collections.abc import Collection, Iterable, Iterator
from contextlib import suppress
from pathlib import Path

from fedtide.fabric.errors import ConfigError
from fedtide.fabric.process.parent_death import die_with_parent
from fedtide.fabric.strict import Strict

_MOST = 2**32 - 2
_SET_DUMPABLE = 4
_READ, _PASS = 4, 1


class User(Strict):
    """A user of this machine."""

    name: str
    uid: int
    gid: int


def user_of(told: str) -> User:
    """The user of a name or number; a number needs no entry among the machine's users.

    Raises:
        ConfigError: there is none, or it is root.
    """
    number = int(told) if told.isascii() and told.isdecimal() else None
    try:
        entry = pwd.getpwnam(told) if number is None else pwd.getpwuid(min(number, _MOST))
        found = User(name=entry.pw_name, uid=entry.pw_uid, gid=entry.pw_gid)
    except KeyError as exc:
        if number is None:
            made = f"useradd --system --no-create-home --shell /usr/sbin/nologin {told}"
            raise ConfigError("agent.apps_user", f"this machine has no user {told!r}", made) from exc
        found = User(name=told, uid=number, gid=number)
    if not (0 < found.uid < _MOST and found.gid != 0):
        raise ConfigError("agent.apps_user", f"{told!r} is not a user that apps may run as", "One that is not root's")
    return found


def become(user: User, groups: Iterable[int]) -> None:
    """From now on this process is of that user, and of these groups beside its own. Only as root; for good.

    Raises:
        OSError: the kernel does not let it.
    """
    os.setgroups(sorted({*groups} - {0}))
    os.setresgid(user.gid, user.gid, user.gid)
    os.setresuid(user.uid, user.uid, user.uid)
    os.environ |= {"USER": user.name, "LOGNAME": user.name}
    die_with_parent()  # the kernel has forgotten it
    ctypes.CDLL(None).prctl(_SET_DUMPABLE, 1, 0, 0, 0)  # else its own /proc is root's


def hand_over(folder: Path, uid: int, gid: int) -> None:
    """Make a folder, with all in it, a user's. Nothing is looked at if it is the user's already."""
    if folder.stat().st_uid == uid:
        return
    for entry in _below(folder):
        with suppress(OSError):
            if entry.is_dir(follow_symlinks=False) or entry.stat(follow_symlinks=False).st_nlink == 1:
                os.chown(entry.path, uid, gid, follow_symlinks=False)  # others may be somebody else's, by another name
    os.chown(folder, uid, gid)


def let_read(folders: Iterable[Path]) -> None:
    """Let everybody who gets to these folders, which are the agent's, read what is in them."""
    for folder in (folder for folder in folders if folder.exists()):
        folder.chmod(folder.stat().st_mode | 0o055)
        for entry in _below(folder):
            with suppress(OSError):
                mode = entry.stat(follow_symlinks=False).st_mode
                more = 0o055 if mode & 0o100 else 0o044
                if mode & more != more and not entry.is_symlink():
                    os.chmod(entry.path, mode | more)


def _below(folder: Path) -> Iterator[os.DirEntry[str]]:
    """All files and folders in it, however deep as long as the kernel takes their paths."""
    waiting = [str(folder)]
    while waiting:
        with suppress(OSError), os.scandir(waiting.pop()) as entries:
            for entry in entries:
                yield entry
                if entry.is_dir(follow_symlinks=False):
                    waiting.append(entry.path)


def closed_to(user: User, paths: Collection[Path]) -> set[Path]:
    """The folders, each the topmost on its way, that this user may not pass to reach one of the paths."""
    found = set()
    for path in {*paths, *(path.resolve() for path in paths)}:
        ways = (folder for folder in reversed(path.parents) if folder.exists() and not _lets(folder, user, _PASS))
        found |= {*itertools.islice(ways, 1)}
    return found


def may_read(path: Path, user: User) -> bool:
    """Whether a file or folder lets this user read it, wherever it lies."""
    return _lets(path, user, _READ | _PASS if path.is_dir() else _READ)


def _lets(path: Path, user: User, wanted: int) -> bool:
    about = path.stat()
    whose = 6 if about.st_uid == user.uid else 3 if about.st_gid == user.gid else 0
    return about.st_mode >> whose & wanted == wanted
