"""The outbox: a finished answer is on disk before its task counts as done, and leaves when it can.

One folder a task below `pending/`; an empty file below `done/` remembers what was sent, so a
task that is delivered again after a restart is not trained twice. What the task made of its run's
state (`Context.state`) is part of the answer: both are kept, or neither.
"""

from __future__ import annotations

import shutil
import time
from dataclasses import dataclass
from pathlib import Path

from fedtide.edge_agent.training.job import STATE
from fedtide.fabric.encoding import from_json, to_json
from fedtide.fabric.errors import MalformedMessage
from fedtide.fabric.messages.tasks import Reply
from fedtide.fabric.process.files import sync

DONE_KEPT_S = 7 * 24 * 3600


@dataclass(frozen=True, slots=True)
class Pending:
    """One answer that waits to be sent; `blobs` maps digests to files."""

    reply: Reply
    blobs: dict[str, Path]


class Outbox:
    """Owns `root`, and the states in `states`; a trainer writes into the folder of its own task only."""

    def __init__(self, root: Path, states: Path) -> None:
        self._states = states
        self._pending = root / "pending"
        self._done = root / "done"
        self._work = root / "work"
        shutil.rmtree(self._work, ignore_errors=True)
        for folder in (self._pending, self._done, self._work, states):
            folder.mkdir(parents=True, exist_ok=True)
        for entry in self._pending.iterdir():
            self._install_state(entry)
        self._forget_old()

    def knows(self, task: str) -> bool:
        """Whether the task was answered already (sent or waiting)."""
        return (self._done / task).exists() or (self._pending / task).exists()

    def folder(self, task: str) -> Path:
        """Where the answer to `task` is put together."""
        return self._work / task

    def open(self, task: str) -> None:
        """Make that folder, empty."""
        shutil.rmtree(self.folder(task), ignore_errors=True)
        self.folder(task).mkdir(parents=True)

    def commit(self, reply: Reply) -> None:
        """Make the answer durable: from here on it is sent, whatever dies in between."""
        if (self._pending / reply.task).exists():
            return  # an earlier try came that far
        folder = self.folder(reply.task)
        folder.mkdir(parents=True, exist_ok=True)
        target = folder / "reply.json"
        target.write_bytes(to_json(reply))
        for part in folder.iterdir():
            sync(part)
        folder.rename(self._pending / reply.task)
        sync(self._pending)
        self._install_state(self._pending / reply.task)

    def _install_state(self, entry: Path) -> None:
        if (entry / STATE).exists():
            run = from_json(Reply, (entry / "reply.json").read_bytes(), "reply.json").run
            (entry / STATE).replace(self.state_of(run))

    def state_of(self, run: str) -> Path:
        """Where a run's state stands between its tasks."""
        return self._states / f"{run}.state"

    def waiting(self) -> list[str]:
        """Tasks whose answers wait, oldest first."""
        return [p.name for p in sorted(self._pending.iterdir(), key=lambda p: p.stat().st_mtime)]

    def read(self, task: str) -> Pending:
        """Raises MalformedMessage if the disk lost part of it."""
        folder = self._pending / task
        try:
            reply = from_json(Reply, (folder / "reply.json").read_bytes(), "reply.json")
        except (OSError, MalformedMessage) as exc:
            raise MalformedMessage(f"outbox entry {task} is damaged") from exc
        return Pending(reply, {ref.digest: folder / ref.digest for ref in reply.message.blobs()})

    def sent(self, task: str) -> None:
        """The broker has it: keep only the memory that it was done."""
        (self._done / task).touch()
        shutil.rmtree(self._pending / task, ignore_errors=True)

    def drop(self, task: str) -> None:
        """Nobody wants this task any more."""
        (self._done / task).touch()
        shutil.rmtree(self._work / task, ignore_errors=True)
        shutil.rmtree(self._pending / task, ignore_errors=True)

    def _forget_old(self) -> None:
        limit = time.time() - DONE_KEPT_S
        for marker in self._done.iterdir():
            if marker.stat().st_mtime < limit:
                marker.unlink()
