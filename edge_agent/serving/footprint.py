"""Releases memory that was used during start-up and is not needed for serving."""

from __future__ import annotations

import ctypes
import gc
import logging
from pathlib import Path

log = logging.getLogger(__name__)

_MADV_DONTNEED = 4
"""Drop pages; unmodified pages of a file are read again at their next use (madvise(2))."""


def shrink() -> None:
    """Return free heap to the kernel, and let go of program text that was touched only at start.

    What is still needed comes back from the page cache at its next use. On systems without this nothing happens.
    """
    gc.collect()
    gc.freeze()  # modules and classes live as long as we do: no need to look at them again
    try:
        libc = ctypes.CDLL("libc.so.6", use_errno=True)
        libc.malloc_trim(0)
        for start, size in _program_text():
            libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(size), _MADV_DONTNEED)
    except (OSError, AttributeError) as exc:
        log.debug("footprint.not_shrunk", extra={"reason": str(exc)})


def _program_text() -> list[tuple[int, int]]:
    """Address and size of the executable mappings of files: nobody has written to those."""
    found = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        fields = line.split(maxsplit=5)
        if len(fields) == 6 and fields[5].startswith("/") and fields[1] == "r-xp":
            first, last = (int(end, 16) for end in fields[0].split("-"))
            found.append((first, last - first))
    return found
