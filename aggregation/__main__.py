"""`python -m aggregation CONFIG`: what a launcher starts."""

from __future__ import annotations

import os
import select
import sys
import threading
from pathlib import Path

from aggregation.config import WorkerConfig
from aggregation.worker import run
from fabric import logs

LIFELINE = "FEDTIDE_LIFELINE_PID"
"""Set by a supervisor that owns this process though it did not start it (embedded mode)."""


def _end_with(pid: int) -> None:
    try:
        handle = os.pidfd_open(pid)
    except ProcessLookupError:
        os._exit(1)
    select.select([handle], [], [])
    os._exit(1)


def main() -> int:
    logs.to_stderr()
    if owner := os.environ.get(LIFELINE):
        threading.Thread(target=_end_with, args=(int(owner),), daemon=True).start()
    return run(WorkerConfig.model_validate_json(Path(sys.argv[1]).read_bytes()))


if __name__ == "__main__":
    sys.exit(main())
