"""`python -m fedtide.aggregation CONFIG | --fork-server FOLDER`: what a launcher starts."""

from __future__ import annotations

import logging
import os
import select
import sys
import threading
import traceback
from pathlib import Path

from fedtide.aggregation.config import WorkerConfig
from fedtide.aggregation.fork_server import config_of_this_fork
from fedtide.aggregation.worker import run
from fedtide.fabric import logs

LIFELINE = "FEDTIDE_LIFELINE_PID"
"""Environment variable: PID of the owning supervisor; this process ends with it (embedded mode)."""


def _end_with(pid: int) -> None:
    try:
        handle = os.pidfd_open(pid)
    except ProcessLookupError:
        os._exit(1)
    select.select([handle], [], [])
    os._exit(1)


def main() -> int:
    logs.to_stderr()
    if sys.argv[1] != "--fork-server":
        return _run(Path(sys.argv[1]))
    file = config_of_this_fork()
    if file is None:
        return 0
    code = 1
    try:
        code = _run(file)
    except BaseException:
        traceback.print_exc()
    finally:
        logging.shutdown()
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(code)


def _run(file: Path) -> int:
    if owner := os.environ.get(LIFELINE):
        threading.Thread(target=_end_with, args=(int(owner),), daemon=True).start()
    return run(WorkerConfig.model_validate_json(file.read_bytes()), file, os._exit)


if __name__ == "__main__":
    sys.exit(main())
