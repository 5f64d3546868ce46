"""The work folders of local aggregators: logs and notes of runs that ended some time ago go."""

from __future__ import annotations

import shutil
import time
from collections.abc import Collection
from pathlib import Path

KEPT_S = 7 * 86_400.0
"""After the last change in it; somebody may still want to read the log of a run that failed."""


def forgotten(root: Path, active: Collection[str]) -> list[Path]:
    """The folders below `root` of runs that are over."""
    if not root.is_dir():
        return []
    limit = time.time() - KEPT_S
    folders = (each for each in sorted(root.iterdir()) if each.is_dir() and each.name not in active)
    return [folder for folder in folders if _changed_at(folder) < limit]


def _changed_at(folder: Path) -> float:
    try:
        return max(each.lstat().st_mtime for each in (folder, *folder.iterdir()))
    except FileNotFoundError:  # something is at work there
        return time.time()


def delete(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
