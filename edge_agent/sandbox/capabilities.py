"""An app keeps no capability of the user that the agent runs as (capabilities(7)): that is root in many pods."""

from __future__ import annotations

import ctypes
import struct

_VERSION_3 = 0x20080522
_BOUNDING_DROP, _SET_SECUREBITS, _AMBIENT, _CLEAR_ALL = 24, 28, 47, 4
_NO_ROOT = 0x2F
"""SECBIT_NOROOT, NO_SETUID_FIXUP and KEEP_CAPS' lock: a program that root starts gets nothing back."""
_MOST = 64


def drop_for_good() -> None:
    """Nothing that this process or what it starts executes has any from now on: what it holds itself it still has."""
    libc = ctypes.CDLL(None)
    for number in range(_MOST):
        libc.prctl(_BOUNDING_DROP, number, 0, 0, 0)
    libc.prctl(_AMBIENT, _CLEAR_ALL, 0, 0, 0)
    libc.prctl(_SET_SECUREBITS, _NO_ROOT, 0, 0, 0)


def drop_held() -> None:
    """Those that this process holds itself. Raises OSError if it still has them."""
    libc = ctypes.CDLL(None, use_errno=True)
    header, none = struct.pack("=Ii", _VERSION_3, 0), struct.pack("=6I", *[0] * 6)
    if libc.capset(header, none) != 0:
        raise OSError(ctypes.get_errno(), "capabilities cannot be given up")
