"""`python -m fedtide.aggregation CONFIG | --wait FOLD_WORKER`: what a launcher starts."""

from __future__ import annotations

import os
import select
import sys
import threading
from pathlib import Path

from fedtide.aggregation.config import WorkerConfig
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


def _wait() -> WorkerConfig | None:
    """Spare mode: read the path of a run's config from standard input. None at the end of input."""
    file = sys.stdin.readline().strip()
    if not file:
        return None
    config = WorkerConfig.model_validate_json(Path(file).read_bytes())
    logfile = os.open(config.work_dir / "aggregator.log", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    os.dup2(logfile, 1)
    os.dup2(logfile, 2)
    return config


def main() -> int:
    logs.to_stderr()
    if owner := os.environ.get(LIFELINE):
        threading.Thread(target=_end_with, args=(int(owner),), daemon=True).start()
    config = _wait() if sys.argv[1] == "--wait" else WorkerConfig.model_validate_json(Path(sys.argv[1]).read_bytes())
    return run(config, os._exit) if config is not None else 0


if __name__ == "__main__":
    sys.exit(main())
