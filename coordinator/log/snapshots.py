"""Snapshots of the world in the broker: what keeps a replay short. The log itself is never cut."""

from __future__ import annotations

import asyncio
import logging

from fedtide.coordinator.log import snapshot_codec
from fedtide.coordinator.log.snapshot_codec import Snapshot
from fedtide.fabric.encoding import from_json, to_json
from fedtide.fabric.errors import FedtideError, MalformedMessage
from fedtide.fabric.nats.broker import Broker
from fedtide.fabric.nats.compare_and_set import replace_stored
from fedtide.fabric.nats.subjects import CONTROL, Subjects
from fedtide.fabric.nats.transfer import Source, put_blob, read_blob
from fedtide.fabric.process.retry import until_done
from fedtide.fabric.strict import Message
from fedtide.fabric.tensors.blobs import BlobRef

log = logging.getLogger(__name__)


class SnapshotRef(Message):
    """Names the newest snapshot: the event after which it was taken, and its blob."""

    sequence: int
    blob: BlobRef


class Snapshots:
    """Reads and writes the one snapshot that a tenant keeps."""

    def __init__(self, broker: Broker, subjects: Subjects) -> None:
        self._broker = broker
        self._subjects = subjects

    async def load(self) -> Snapshot | None:
        """The newest snapshot that this code can read, or None: replay from the start. Waits for the broker."""
        try:
            data = await until_done(log, "snapshot.waits", self._read)
            return None if data is None else snapshot_codec.decode(data)
        except FedtideError as exc:
            log.warning("snapshot.not_read", extra={"reason": str(exc)})
            return None

    async def stored(self) -> str:
        """The digest of the newest snapshot's blob; empty if there is none.

        Raises:
            MalformedMessage: another version wrote its name.
        """
        ref = await self._ref()
        return ref.blob.digest if ref is not None else ""

    async def save(self, snapshot: Snapshot) -> None:
        """Store a snapshot; the previous one is deleted once this one is stored."""
        data = await asyncio.to_thread(snapshot_codec.encode, snapshot)
        try:
            old = await self._ref()
        except MalformedMessage:
            old = None
        blob = await put_blob(self._broker, self._subjects.snapshot_blob, CONTROL, [data], ttl_s=None)
        ref = SnapshotRef(sequence=snapshot.sequence, blob=blob)

        def replaces(stored: bytes) -> bool:
            try:
                return from_json(SnapshotRef, stored, "snapshot").sequence < ref.sequence
            except MalformedMessage:
                return True

        if not await replace_stored(self._broker, CONTROL, self._subjects.snapshot, to_json(ref), replaces):
            return  # the leader that followed has stored a newer one
        if old is not None and old.blob != blob:
            await self._broker.purge(CONTROL, f"{self._subjects.snapshot_blob(old.blob.digest)}.>")
        log.info("snapshot.saved", extra={"sequence": snapshot.sequence, "bytes": len(data)})

    async def _read(self) -> bytes | None:
        ref = await self._ref()
        if ref is None:
            return None
        return bytes(await read_blob(Source(self._broker, CONTROL), self._subjects.snapshot_blob, ref.blob))

    async def _ref(self) -> SnapshotRef | None:
        found = await self._broker.last(CONTROL, self._subjects.snapshot)
        return from_json(SnapshotRef, found.data, "snapshot") if found is not None else None
