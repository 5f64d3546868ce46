"""Linux' Landlock: a process gives up rights to files, ports, signals and other processes, for itself and its children.

It needs no privilege, and nothing gives the rights back. https://docs.kernel.org/userspace-api/landlock.html;
the numbers are those of include/uapi/linux/landlock.h, and the same on all architectures.
"""

from __future__ import annotations

import ctypes
import os
import stat
import struct
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

_CREATE, _ADD_RULE, _RESTRICT = 444, 445, 446
_ABI_ASKED, _PATH_BENEATH = 1, 1
_NO_NEW_PRIVS = 38
_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_DIR = (1 << n for n in range(4))
_REFER, _TRUNCATE, _IOCTL_DEV = (1 << n for n in (13, 14, 15))
_ALL_OF_ABI_1 = (1 << 13) - 1
_READ = _EXECUTE | _READ_FILE | _READ_DIR
_OF_FILES = _EXECUTE | _WRITE_FILE | _READ_FILE | _TRUNCATE | _IOCTL_DEV
_BIND_TCP, _CONNECT_TCP = 1, 2
_ABSTRACT_SOCKETS, _SIGNALS = 1, 2


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def abi() -> int:
    """The version that this kernel has; 0: none."""
    found = _libc().syscall(_CREATE, None, ctypes.c_size_t(0), ctypes.c_uint32(_ABI_ASKED))
    return max(int(found), 0)


def no_new_privileges() -> None:
    """From now on no setuid program gives this process or its children anything. Raises OSError."""
    _checked(_libc().prctl(_NO_NEW_PRIVS, 1, 0, 0, 0))


def restrict(read: Iterable[Path], write: Iterable[Path], *, tcp: bool) -> None:
    """Give up all files but those below `read` and `write`, and signals to all who do not share this restriction.

    Only for a process with one thread. What is not there is left out.

    Args:
        tcp: whether ports may be bound and connected to (kernels before 6.7 cannot forbid it).

    Raises:
        OSError: the kernel refuses.
    """
    version = abi()
    files = _ALL_OF_ABI_1
    files |= _REFER if version >= 2 else 0
    files |= _TRUNCATE if version >= 3 else 0
    files |= _IOCTL_DEV if version >= 5 else 0
    ports = 0 if tcp or version < 4 else _BIND_TCP | _CONNECT_TCP
    scoped = _ABSTRACT_SOCKETS | _SIGNALS if version >= 6 else 0
    about = struct.pack("=QQQ", files, ports, scoped)[: 24 if version >= 6 else 16 if version >= 4 else 8]
    libc = _libc()
    ruleset = _checked(libc.syscall(_CREATE, about, ctypes.c_size_t(len(about)), ctypes.c_uint32(0)))
    try:
        for paths, rights in ((read, _READ), (write, files)):
            for path in paths:
                with suppress(FileNotFoundError, PermissionError):
                    _allow(libc, ruleset, path, rights & files)
        no_new_privileges()
        _checked(libc.syscall(_RESTRICT, ruleset, ctypes.c_uint32(0)))
    finally:
        os.close(ruleset)


def _allow(libc: ctypes.CDLL, ruleset: int, path: Path, rights: int) -> None:
    opened = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        if not stat.S_ISDIR(os.fstat(opened).st_mode):
            rights &= _OF_FILES
        rule = struct.pack("=Qi", rights, opened)
        _checked(libc.syscall(_ADD_RULE, ruleset, _PATH_BENEATH, rule, ctypes.c_uint32(0)))
    finally:
        os.close(opened)


def _checked(answer: int) -> int:
    if answer < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return answer
