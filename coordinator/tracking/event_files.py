"""Runs as TensorBoard reads them: a folder of event files for each, below that of its experiment."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

from fedtide.coordinator.tracking.record import RunRecord
from fedtide.fabric.process.files import write_atomically

_WRITTEN = ".fedtide.json"
"""Beside the event files: up to which round they go, and whether the end is written."""


def report(record: RunRecord, root: Path) -> None:
    """Add to the run's event files what of `record` is not there yet; again changes nothing.

    Raises:
        OSError: they cannot be written.
    """
    from tensorboardX import SummaryWriter

    folder = root / re.sub(r"[^\w\-. ]", "_", record.experiment) / record.run
    note = folder / _WRITTEN
    written: dict[str, Any] = json.loads(note.read_text()) if note.exists() else {"round": -1, "ended": None}
    new = [each for each in record.rounds if each.round > written["round"]]
    if not new and written["ended"] == record.ended and note.exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    with SummaryWriter(str(folder)) as writer:
        if written["round"] < 0 and record.params:
            writer.add_text("parameters", _table(record.params), 0, walltime=record.began)
        for each in new:
            for name, value in each.metrics.items():
                writer.add_scalar(name, value, each.round, walltime=each.at)
        if record.ended is not None:
            last = record.rounds[-1].round if record.rounds else 0
            writer.add_text("outcome", _table({"outcome": record.outcome, **record.tags}), last, walltime=record.ended)
    if record.ended is not None:
        for name, file in record.files.items():
            shutil.copyfile(file, folder / name)
    done = {"round": max([written["round"], *(each.round for each in new)]), "ended": record.ended}
    write_atomically(note, json.dumps(done).encode())


def _table(values: dict[str, str]) -> str:
    lines = [f"| {name} | {value} |" for name, value in values.items()]
    return "\n".join(["| | |", "|---|---|", *lines])
