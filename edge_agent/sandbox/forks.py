"""How many processes an app may have, kept by the process that has forked it: the kernel asks it before each fork.

seccomp's user notification (seccomp_unotify(2), Linux 5.5): the filter (`syscalls`) hands calls that make a process to
a listener, which lets them go on or fail. Limits of users do not count for root, and control groups are not always
delegated; this needs neither. Threads are not counted.
"""

from __future__ import annotations

import errno
import fcntl
import os
import select
import socket
import struct
from collections.abc import Callable

_RECEIVE, _SEND = 0xC0502100, 0xC0182101
_NOTICE, _ANSWER = struct.Struct("=QII64x"), struct.Struct("=QqiI")
_CONTINUE = 1


def hand_over(listener: int, control: socket.socket) -> None:
    """Give the listener of this process's filter to the process that watches it."""
    socket.send_fds(control, [b"f"], [listener])
    os.close(listener)


def taken(control: socket.socket) -> int | None:
    """The listener that a child has handed over; None: it is gone, or has none."""
    _, numbers, _, _ = socket.recv_fds(control, 1, 1)
    return numbers[0] if numbers else None


def decide(listener: int, may_fork: Callable[[], bool]) -> bool:
    """Answer one question of the kernel; whether there may be more (the filter's processes live)."""
    notice = bytearray(_NOTICE.size)
    try:
        fcntl.ioctl(listener, _RECEIVE, notice)
    except OSError as exc:
        return exc.errno == errno.EINTR or (exc.errno == errno.ENOENT and _is_alive(listener))
    number = _NOTICE.unpack(notice)[0]
    allowed = may_fork()
    answer = _ANSWER.pack(number, 0, 0 if allowed else -errno.EAGAIN, _CONTINUE if allowed else 0)
    try:
        fcntl.ioctl(listener, _SEND, bytearray(answer))
    except OSError as exc:
        return exc.errno == errno.ENOENT  # whoever asked was killed meanwhile
    return True


def _is_alive(listener: int) -> bool:
    """Whether any process has the filter: else the listener hangs up."""
    poll = select.poll()
    poll.register(listener, select.POLLIN)
    return not any(event & select.POLLHUP for _, event in poll.poll(0))
