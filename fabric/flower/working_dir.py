"""The working directory of an app: a folder of its run, in which the app finds its own files by relative paths."""

from __future__ import annotations

import os
import shutil
from pathlib import Path


def enter(folder: Path, app_dir: Path) -> None:
    """Make `folder` the working directory.

    Files of the app are copied, its folders are links: what the app writes beside them is the run's alone.
    """
    if os.getcwd() == str(folder):
        return
    folder.mkdir(parents=True, exist_ok=True)
    for entry in app_dir.iterdir():
        there = folder / entry.name
        if there.exists() or entry.name == "__pycache__":
            continue
        if entry.is_dir():
            there.symlink_to(entry.resolve(), target_is_directory=True)
        else:
            shutil.copyfile(entry, there)
    os.utime(folder)
    os.chdir(folder)
