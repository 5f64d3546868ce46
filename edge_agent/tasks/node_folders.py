"""What is kept in a node's folder of past runs, and for how long: apps, their logs, working folders and downloads."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

from fedtide.edge_agent.tasks.app_logs import app_log_file

DAY_S = 24 * 3600.0
STATE_KEPT_S = 90 * DAY_S
"""How long the state of a run's ClientApp is kept after its last use."""
APP_KEPT_S = 30 * DAY_S
"""How long an unpacked app is kept after its last task."""
MOST_APPS = 20
"""Of more than these, those that were not used for longest go: every edit of an app is another one."""
WORK_KEPT_S = 7 * DAY_S
"""How long the working directory of a run is kept after its last task."""
LOG_KEPT_S = 14 * DAY_S
"""How long what an app has printed in a run is kept."""
DOWNLOAD_KEPT_S = DAY_S
"""How long partial downloads and anchor models are kept after their last use."""


def tidy(data_dir: Path) -> None:
    """Remove what is not kept any longer."""
    for folder, pattern, kept_s in (
        (data_dir / "runs", "*.state", STATE_KEPT_S),
        (data_dir / "downloads", "*", DOWNLOAD_KEPT_S),
        (data_dir / "progress", "*", DOWNLOAD_KEPT_S),
        (data_dir / "work", "*", WORK_KEPT_S),
        (app_log_file(data_dir, "x").parent, "*", LOG_KEPT_S),
    ):
        _forget(_older(folder, pattern, kept_s))
    forget_apps(data_dir)


def forget_downloads(data_dir: Path) -> None:
    """Remove downloads that are not kept any longer."""
    _forget(_older(data_dir / "downloads", "*", DOWNLOAD_KEPT_S))


def forget_apps(data_dir: Path) -> None:
    """Remove apps that are not kept any longer, or are too many."""
    newest_last = sorted((data_dir / "apps").glob("[!.]*"), key=lambda path: path.stat().st_mtime)
    _forget(newest_last[: max(0, len(newest_last) - MOST_APPS)])
    _forget(_older(data_dir / "apps", "*", APP_KEPT_S))


def _older(folder: Path, pattern: str, kept_s: float) -> list[Path]:
    limit = time.time() - kept_s
    return [path for path in folder.glob(pattern) if path.stat().st_mtime < limit]


def _forget(paths: list[Path]) -> None:
    for path in paths:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
