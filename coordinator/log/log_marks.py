"""What a coordinator remembers of the log outside of the broker, so that a lost log is not taken for a new one.

On a machine it is a file of the coordinator's folder, in a cluster a ConfigMap.
"""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from typing import Any, Protocol

from fedtide.coordinator.log.engine import Engine
from fedtide.fabric.encoding import from_json, to_json
from fedtide.fabric.errors import FedtideError, LogLost, TransientError
from fedtide.fabric.events.identity import LogBegun, LogRestored
from fedtide.fabric.ids import unguessable
from fedtide.fabric.nats.broker import Broker
from fedtide.fabric.nats.subjects import EVENTS
from fedtide.fabric.process.files import write_atomically
from fedtide.fabric.process.retry import until_done
from fedtide.fabric.strict import Message

log = logging.getLogger(__name__)

WRITE_EVERY_S = 60.0


class Mark(Message):
    """The log that was there last, and how far it went; `restored`: why it was put back since, if it was."""

    epoch: str
    sequence: int = 0
    restored: str = ""


class Marks(Protocol):
    """Where the mark is kept."""

    where: str

    async def read(self) -> Mark | None: ...
    async def write(self, mark: Mark) -> None: ...


class FileMarks:
    """In a file."""

    def __init__(self, folder: Path) -> None:
        self._file = folder / "log.json"
        self.where = f"the file {self._file}"

    async def read(self) -> Mark | None:
        try:
            return from_json(Mark, self._file.read_bytes(), str(self._file))
        except FileNotFoundError:
            return None

    async def write(self, mark: Mark) -> None:
        self._file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(self._file, to_json(mark))


class ConfigMapMarks:
    """In a ConfigMap, which `helm uninstall` leaves."""

    def __init__(self, api: Any, namespace: str, release: str, tenant: str = "") -> None:
        """`api`: a kubernetes.client.CoreV1Api. `tenant`: empty for the installation's own log."""
        self._key = f"mark-{tenant}" if tenant else "mark"
        self._api = api
        self._namespace = namespace
        self._name = f"{release}-log"
        self.where = f"the ConfigMap {self._name}"

    async def read(self) -> Mark | None:
        found = await asyncio.to_thread(self._read)
        return (
            from_json(Mark, found[self._key].encode(), self.where) if found is not None and self._key in found else None
        )

    async def write(self, mark: Mark) -> None:
        await asyncio.to_thread(self._write, {self._key: to_json(mark).decode()})

    def _read(self) -> dict[str, str] | None:
        found = _answer(lambda: self._api.read_namespaced_config_map(self._name, self._namespace))
        return None if found is None else dict(found.data or {})

    def _write(self, data: dict[str, str]) -> None:
        body = {"metadata": {"name": self._name}, "data": data}
        if self._read() is None:
            _answer(lambda: self._api.create_namespaced_config_map(self._namespace, body))
        else:
            _answer(lambda: self._api.patch_namespaced_config_map(self._name, self._namespace, body))


def _answer(call: Any) -> Any:
    from kubernetes.client.exceptions import ApiException

    try:
        return call()
    except ApiException as exc:
        if exc.status == 404:
            return None
        raise TransientError(f"the API server says {exc.status} {exc.reason} of the log's ConfigMap") from exc


class LogGuard:
    """Refuses to start on a store that has lost the log, and notices one that was put back."""

    def __init__(self, broker: Broker, marks: Marks) -> None:
        self._broker = broker
        self._marks = marks
        self._mark: Mark | None = None

    async def check(self) -> None:
        """Before anything is created.

        Raises:
            LogLost: there was a log, and there is none.
        """
        self._mark = await until_done(log, "log.mark_waits", self._marks.read)
        if self._mark is not None and await until_done(log, "log.guard_waits", self._is_empty):
            raise LogLost(
                f"the hub's store has no event log, but this installation has one of {self._mark.sequence} events",
                "Is it the right volume, and the right key for it? `fedtide restore` puts a backup back. "
                f"To begin anew, without what was decided so far, delete {self._marks.where}",
            )

    async def _is_empty(self) -> bool:
        return not await self._broker.has_stream(EVENTS) or await self._broker.last_sequence(EVENTS) == 0

    async def settle(self, engine: Engine) -> None:
        """As the leader: give a log that has no name one; another, if it is not the one that was there last."""
        # Read again: whoever led meanwhile has written since this process started.
        here, before = engine.world.epoch, await until_done(log, "log.mark_waits", self._marks.read)
        if not here.id:
            await engine.submit(LogBegun(epoch=unguessable()))
        elif before is not None and (reason := _why_put_back(before, here.id, engine.last_sequence)) is not None:
            log.warning("log.restored", extra={"reason": reason})
            await engine.submit(LogRestored(epoch=unguessable(), reason=reason))

    async def keep(self, engine: Engine) -> None:
        """Write how far the log goes, for ever."""
        while True:
            mark = Mark(epoch=engine.world.epoch.id, sequence=engine.last_sequence)
            if mark != self._mark:
                try:
                    await self._marks.write(mark)
                    self._mark = mark
                except (FedtideError, OSError) as exc:
                    log.warning("log.not_marked", extra={"reason": str(exc)})
            await asyncio.sleep(WRITE_EVERY_S)


def _why_put_back(before: Mark, epoch: str, sequence: int) -> str | None:
    if before.restored:
        return before.restored
    if before.epoch != epoch:
        return "it is another log than before"
    if sequence < before.sequence:
        return f"it ends at {sequence}, and went to {before.sequence} before"
    return None
