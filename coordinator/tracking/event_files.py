"""Runs as TensorBoard reads them: a folder of event files for each, below that of its experiment."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

from fedtide.coordinator.tracking.record import RunRecord, TrackedRound
from fedtide.fabric.process.files import write_atomically

_WRITTEN = ".fedtide.json"
"""Beside the event files: up to which round they go, and whether the end is written."""


def report(record: RunRecord, root: Path) -> bool:
    """Add to the run's event files what of `record` is not there yet; again changes nothing.

    Returns:
        Whether it has ended and its artefacts are wanted, to be reported with them.

    Raises:
        OSError: they cannot be written.
    """
    folder = root / _folder_name(record.experiment) / _folder_name(record.run)
    note = folder / _WRITTEN
    written: dict[str, Any] = json.loads(note.read_text()) if note.exists() else {"round": -1, "ended": None}
    new = [each for each in record.rounds if each.round > written["round"]]
    ends = record.ended is not None and written["ended"] != record.ended
    if new or not note.exists():
        folder.mkdir(parents=True, exist_ok=True)
        _write_rounds(folder, record, new, after=written["round"])
        written["round"] = max([written["round"], *(each.round for each in new)])
        write_atomically(note, json.dumps(written).encode())
    if not ends or record.files is None:
        return ends
    for name, file in record.files.items():
        shutil.copyfile(file, folder / name)
    with _writer(folder, written["round"] + 1) as writer:
        text = _table({"outcome": record.outcome, **record.tags})
        writer.add_text("outcome", text, max(0, written["round"]), walltime=record.ended)
    write_atomically(note, json.dumps({**written, "ended": record.ended}).encode())
    return False


def _write_rounds(folder: Path, record: RunRecord, rounds: list[TrackedRound], *, after: int) -> None:
    with _writer(folder, after) as writer:
        if after < 0 and record.params:
            writer.add_text("parameters", _table(record.params), 0, walltime=record.began)
        for each in rounds:
            for name, value in each.metrics.items():
                writer.add_scalar(name, value, each.round, walltime=each.at)


def _writer(folder: Path, part: int) -> Any:
    """By itself it names files by the second: the next one would take the place of this one."""
    from tensorboardX import SummaryWriter

    return SummaryWriter(str(folder), filename_suffix=f".{part + 1:08d}")


def _folder_name(text: str) -> str:
    """One folder, below the one that it stands in."""
    return re.sub(r"[^\w\-. ]", "_", text)[:100].strip(". ") or "_"


def _table(values: dict[str, str]) -> str:
    lines = [f"| {name} | {value} |" for name, value in values.items()]
    return "\n".join(["| | |", "|---|---|", *lines])
