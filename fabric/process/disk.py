"""When the disk is full, waiting helps; when it is broken, it does not."""

from __future__ import annotations

import errno

_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


def is_full(error: BaseException) -> bool:
    """Whether `error` says that there is no room now (also by a quota or a limit on file sizes)."""
    return isinstance(error, OSError) and error.errno in _FULL
