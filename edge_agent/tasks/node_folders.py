"""What is kept in a node's folder of past runs, and for how long: apps, their logs, working folders and downloads."""

from __future__ import annotations

import logging
import os
import time
from contextlib import suppress
from pathlib import Path

from fedtide.edge_agent.tasks.app_logs import app_log_file
from fedtide.fabric.process.files import remove_tree

log = logging.getLogger(__name__)

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
        (data_dir / "jobs", "*", WORK_KEPT_S),
        (data_dir / "progress", "*", DOWNLOAD_KEPT_S),  # of versions before the sandbox
        (data_dir / "homes", "*", APP_KEPT_S),
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
    newest_last = sorted((data_dir / "apps").glob("[!.]*"), key=_changed_at)
    _forget(newest_last[: max(0, len(newest_last) - MOST_APPS)])
    _forget(_older(data_dir / "apps", "*", APP_KEPT_S))


def _older(folder: Path, pattern: str, kept_s: float) -> list[Path]:
    limit = time.time() - kept_s
    return [path for path in folder.glob(pattern) if _changed_at(path) < limit]


def _changed_at(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:  # a link to nowhere, or gone
        return 0.0


def _forget(paths: list[Path]) -> None:
    """What an app has made unremovable stays, and is said: it ends no agent."""
    for path in paths:
        try:
            if path.is_dir() and not path.is_symlink():
                with suppress(RecursionError):
                    for folder, _, _ in os.walk(path):
                        Path(folder).chmod(0o700)  # an app may have taken the right away, as some caches do
                remove_tree(path)
            else:
                path.unlink()
        except OSError as exc:
            log.warning("folder.not_removed", extra={"path": str(path), "reason": str(exc)})
