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
_ALLOW, _REFUSE = 0x7FFF0000, 0x00050000 | 1  # EPERM
_LOAD, _EQUAL, _AT_LEAST, _RETURN = 0x20, 0x15, 0x35, 0x06
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


def forbid(*, network: bool) -> bool:
    """Install the filter for this process and its children, for good; whether this machine is known.

    It needs `no_new_privileges` before (landlock).

    Args:
        network: whether sockets of other families than AF_UNIX may be made.

    Raises:
        OSError: the kernel refuses.
    """
    machine = _MACHINES.get(platform.machine())
    if machine is None:
        return False
    program = b"".join(_program(*machine, network=network))
    kept = ctypes.create_string_buffer(program, len(program))
    about = struct.pack("HP", len(program) // 8, ctypes.addressof(kept))
    if ctypes.CDLL(None, use_errno=True).prctl(_SET_SECCOMP, _FILTER, about, 0, 0) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return True


def _program(arch: int, socket: int, forbidden: dict[str, int], *, network: bool) -> Iterator[bytes]:
    """Instructions (struct sock_filter), each check with its refusal right behind it: jumps stay short."""
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
    if not network:
        yield _instruction(_EQUAL, socket, otherwise=3)
        yield _instruction(_LOAD, _FIRST_ARGUMENT)
        yield _instruction(_EQUAL, _AF_UNIX, then=1)
        yield refuse
    yield _instruction(_RETURN, _ALLOW)


def _instruction(code: int, value: int, then: int = 0, otherwise: int = 0) -> bytes:
    return struct.pack("=HBBI", code, then, otherwise, value)
