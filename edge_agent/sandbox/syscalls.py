"""A seccomp filter: system calls that training never needs, and with them most of the kernel's attack surface, fail.

Written as the kernel takes it (seccomp(2), classic BPF), for x86-64 and AArch64; elsewhere there is none. A list of
what is forbidden, not of what is allowed: an app may use any library.
"""

from __future__ import annotations

import ctypes
import os
import platform
import struct
from collections.abc import Iterator

_SET_SECCOMP, _FILTER = 22, 2
_SET_FILTER, _NEW_LISTENER = 1, 1 << 3
_SECCOMP = {"x86_64": 317, "aarch64": 277}
_ALLOW, _REFUSE = 0x7FFF0000, 0x00050000 | 1  # EPERM
_NOT_KNOWN, _ASK = 0x00050000 | 38, 0x7FC00000  # ENOSYS; the listener is asked
_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_CLONE_THREAD = 0x10000
_CLONE3 = 435
"""Its flags lie in memory, where no filter looks: C libraries then use clone."""
_CLONE = {"x86_64": 56, "aarch64": 220}
_FORKS = {"x86_64": (57, 58), "aarch64": ()}
_NUMBER, _ARCH, _FIRST_ARGUMENT = 0, 4, 16
_AF_UNIX = 1
_X32 = 0x40000000

_EVERYWHERE = {
    "io_uring_setup": 425,  # opens sockets and files beside this filter
    "open_tree": 428,
    "move_mount": 429,
    "fsopen": 430,
    "fsconfig": 431,
    "fsmount": 432,
    "pidfd_getfd": 438,
    "mount_setattr": 442,
}
_MACHINES: dict[str, tuple[int, int, dict[str, int]]] = {
    "x86_64": (
        0xC000003E,
        41,
        {
            "ptrace": 101,
            "syslog": 103,
            "pivot_root": 155,
            "chroot": 161,
            "acct": 163,
            "settimeofday": 164,
            "mount": 165,
            "umount2": 166,
            "swapon": 167,
            "swapoff": 168,
            "reboot": 169,
            "sethostname": 170,
            "setdomainname": 171,
            "iopl": 172,
            "ioperm": 173,
            "init_module": 175,
            "delete_module": 176,
            "clock_settime": 227,
            "kexec_load": 246,
            "add_key": 248,
            "request_key": 249,
            "keyctl": 250,
            "unshare": 272,
            "perf_event_open": 298,
            "open_by_handle_at": 304,
            "setns": 308,
            "process_vm_readv": 310,
            "process_vm_writev": 311,
            "finit_module": 313,
            "kexec_file_load": 320,
            "bpf": 321,
            "userfaultfd": 323,
        },
    ),
    "aarch64": (
        0xC00000B7,
        198,
        {
            "umount2": 39,
            "mount": 40,
            "pivot_root": 41,
            "chroot": 51,
            "acct": 89,
            "unshare": 97,
            "kexec_load": 104,
            "init_module": 105,
            "delete_module": 106,
            "clock_settime": 112,
            "syslog": 116,
            "ptrace": 117,
            "reboot": 142,
            "sethostname": 161,
            "setdomainname": 162,
            "settimeofday": 170,
            "add_key": 217,
            "request_key": 218,
            "keyctl": 219,
            "swapon": 224,
            "swapoff": 225,
            "perf_event_open": 241,
            "open_by_handle_at": 265,
            "setns": 268,
            "process_vm_readv": 270,
            "process_vm_writev": 271,
            "finit_module": 273,
            "bpf": 280,
            "userfaultfd": 282,
            "kexec_file_load": 294,
        },
    ),
}


def forbid(*, network: bool) -> int | None:
    """Install the filter for this process and its children, for good.

    Returns:
        The listener that is asked for each new process (`forks`); None: this machine, or kernel, has none.

    It needs `no_new_privileges` before (landlock).

    Args:
        network: whether sockets of other families than AF_UNIX may be made.

    Raises:
        OSError: the kernel refuses.
    """
    machine = _MACHINES.get(platform.machine())
    if machine is None:
        return None
    libc, name = ctypes.CDLL(None, use_errno=True), platform.machine()
    asking = b"".join(_program(*machine, network=network, clone=_CLONE[name], forks=_FORKS[name]))
    listener = libc.syscall(_SECCOMP[name], _SET_FILTER, _NEW_LISTENER, _about(asking))
    if listener >= 0:
        return int(listener)
    plain = b"".join(_program(*machine, network=network))  # another filter has a listener, or the kernel is older
    if libc.prctl(_SET_SECCOMP, _FILTER, _about(plain), 0, 0) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return None


_KEPT: list[object] = []
"""The programs: the kernel reads them where they are."""


def _about(program: bytes) -> bytes:
    """struct sock_fprog."""
    kept = ctypes.create_string_buffer(program, len(program))
    _KEPT.append(kept)
    return struct.pack("HP", len(program) // 8, ctypes.addressof(kept))


def _program(
    arch: int, socket: int, forbidden: dict[str, int], *, network: bool, clone: int = 0, forks: tuple[int, ...] = ()
) -> Iterator[bytes]:
    """Instructions (struct sock_filter), each check with its refusal right behind it: jumps stay short.

    Args:
        clone, forks: numbers of the calls that the listener is asked about; 0: there is none.
    """
    refuse = _instruction(_RETURN, _REFUSE)
    yield _instruction(_LOAD, _ARCH)
    yield _instruction(_EQUAL, arch, then=1)  # another one's numbers mean other calls
    yield refuse
    yield _instruction(_LOAD, _NUMBER)
    yield _instruction(_AT_LEAST, _X32, otherwise=1)
    yield refuse
    for number in sorted({*forbidden.values(), *_EVERYWHERE.values()}):
        yield _instruction(_EQUAL, number, otherwise=1)
        yield refuse
    if clone:
        yield _instruction(_EQUAL, _CLONE3, otherwise=1)
        yield _instruction(_RETURN, _NOT_KNOWN)
        for number in forks:
            yield _instruction(_EQUAL, number, otherwise=1)
            yield _instruction(_RETURN, _ASK)
        yield _instruction(_EQUAL, clone, otherwise=4)
        yield _instruction(_LOAD, _FIRST_ARGUMENT)
        yield _instruction(_ANY_BIT, _CLONE_THREAD, then=1)
        yield _instruction(_RETURN, _ASK)
        yield _instruction(_RETURN, _ALLOW)
    if not network:
        yield _instruction(_EQUAL, socket, otherwise=3)
        yield _instruction(_LOAD, _FIRST_ARGUMENT)
        yield _instruction(_EQUAL, _AF_UNIX, then=1)
        yield refuse
    yield _instruction(_RETURN, _ALLOW)


def _instruction(code: int, value: int, then: int = 0, otherwise: int = 0) -> bytes:
    return struct.pack("=HBBI", code, then, otherwise, value)
