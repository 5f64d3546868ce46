"""The outbox: a finished reply is on disk before its task counts as done, and is sent when possible.

One folder a task below `pending/`; an empty file below `done/` remembers what was sent, so a
task that is delivered again after a restart is not trained twice. The new state of the
task's run (`Context.state`) is part of the reply: both are kept, or neither.
"""

from __future__ import annotations

import shutil
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from fedtide.edge_agent.training.job import STATE
from fedtide.fabric.encoding import from_json, to_json
from fedtide.fabric.errors import MalformedMessage
from fedtide.fabric.messages.tasks import Reply
from fedtide.fabric.process.files import sync

DONE_KEPT_S = 7 * 24 * 3600
STORED = "stored"
STORED_FOR_S = 24 * 3600
"""After this time a chunk may have expired in the broker: everything is sent again."""


@dataclass(frozen=True, slots=True)
class Pending:
    """One answer that waits to be sent; `blobs` maps digests to files."""

    reply: Reply
    blobs: dict[str, Path]


class StoredChunks(set[str]):
    """Subjects of the chunks that the broker has; each is written down, so that a killed agent does not send it again.

    Only an agent that was killed needs this, not a machine that lost its power: nothing is synced.
    """

    def __init__(self, file: Path) -> None:
        super().__init__()
        self._file = file
        try:
            began, *whole, _ = file.read_text().split("\n")  # the last line may be cut
            if 0 <= time.time() - float(began) < STORED_FOR_S:
                self.update(whole)
                return
        except (OSError, ValueError):
            pass  # none, or one that a power cut has left
        with suppress(OSError):
            file.write_text(f"{time.time()}\n")

    def add(self, subject: str) -> None:
        super().add(subject)
        with suppress(OSError), self._file.open("a") as file:
            file.write(f"{subject}\n")


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
        """The folder in which the reply to `task` is assembled."""
        return self._work / task

    def open(self, task: str) -> None:
        """Make that folder, empty."""
        shutil.rmtree(self.folder(task), ignore_errors=True)
        self.folder(task).mkdir(parents=True)

    def commit(self, reply: Reply) -> None:
        """Make the reply durable: from now on it will be sent, despite any crash."""
        if (self._pending / reply.task).exists():
            return  # an earlier call already did this
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
        """The file of a run's state between its tasks."""
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

    def stored(self, task: str) -> StoredChunks:
        """What of a waiting answer the broker has."""
        return StoredChunks(self._pending / task / STORED)

    def sent(self, task: str) -> None:
        """The broker has stored the reply: keep only a marker that the task is done."""
        (self._done / task).touch()
        shutil.rmtree(self._pending / task, ignore_errors=True)

    def drop(self, task: str) -> None:
        """Mark a task that is no longer wanted as done, and delete its reply."""
        (self._done / task).touch()
        shutil.rmtree(self._work / task, ignore_errors=True)
        shutil.rmtree(self._pending / task, ignore_errors=True)

    def _forget_old(self) -> None:
        limit = time.time() - DONE_KEPT_S
        for marker in self._done.iterdir():
            if marker.stat().st_mtime < limit:
                marker.unlink()
