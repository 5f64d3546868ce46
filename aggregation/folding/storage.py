"""A run's data in the broker besides messages: round models, updates, checkpoints."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass
from typing import Any

from fedtide.aggregation.config import WorkerConfig
from fedtide.fabric.encoding import to_json
from fedtide.fabric.errors import FedtideError
from fedtide.fabric.messages.run_questions import Purge
from fedtide.fabric.messages.tasks import INLINE_BYTES, Arrays
from fedtide.fabric.nats.broker import Broker
from fedtide.fabric.nats.subjects import DOWN, RELEASES, STAY, Subjects, up_stream
from fedtide.fabric.nats.transfer import Prefix, Sink, Source, get_blob, put_blob, read_blob, stream_blob
from fedtide.fabric.process.retry import until_done
from fedtide.fabric.tensors.blobs import MANIFEST_CHUNK, BlobRef, chunked, manifest_of
from fedtide.fabric.tensors.frame import Buffer, frame_size

log = logging.getLogger(__name__)

PURGE_WITHIN_S = 5.0
"""So long a round waits for it: while no coordinator leads, what is left is swept later."""


@dataclass(frozen=True, slots=True)
class StoredUpdate:
    """Where one update's tensors are stored: in the hub, or only in their region (`stays`)."""

    blob: BlobRef
    region: str
    node: str
    stays: bool

    def prefix(self, subjects: Subjects, run: str) -> Prefix:
        where = subjects.stay_blob if self.stays else subjects.update_blob
        return lambda digest: where(self.region, self.node, run, digest)


class Storage:
    """Reads and writes for one run, through the connection of its link."""

    def __init__(self, broker: Broker, config: WorkerConfig) -> None:
        self._broker = broker
        self._config = config
        self._subjects = Subjects(config.tenant)
        self.anchors: list[BlobRef] = []
        """Models that coded models refer to; kept until the run has ended."""

    def round_prefix(self, digest: str) -> str:
        return self._subjects.round_blob(self._config.run, digest)

    async def upload(self, frame: list[Buffer]) -> Arrays:
        """Make a frame available to every node: inline when small, else as a blob of this run's rounds."""
        if frame_size(frame) <= INLINE_BYTES:
            return Arrays(inline=b"".join(frame))
        return Arrays(blob=await self.store(frame, prefix=self.round_prefix))

    async def store(
        self,
        parts: Iterable[Buffer],
        *,
        prefix: Prefix,
        stream: str = DOWN,
    ) -> BlobRef:
        """Store a blob; nothing is sent if it is there."""
        pieces = list(parts)
        ref = await asyncio.to_thread(lambda: manifest_of(list(chunked(pieces))).ref)
        if await self._broker.last(stream, f"{prefix(ref.digest)}.{MANIFEST_CHUNK}") is not None:
            return ref
        # What of it is there this process has no right to list: it is sent again as a whole.
        return await put_blob(self._broker, prefix, stream, pieces, ttl_s=None, stored=set())

    async def fetch(self, ref: BlobRef, *, stream: str = DOWN, prefix: Prefix | None = None) -> bytearray:
        return await read_blob(Source(self._broker, stream), prefix or self._subjects.blob, ref)

    async def store_release(self, parts: Iterable[Buffer]) -> BlobRef:
        """Store a blob of a release; the coordinator keeps it if it publishes that."""

        def prefix(digest: str) -> str:
            return self._subjects.release_upload(self._config.run, digest)

        return await self.store(parts, stream=RELEASES, prefix=prefix)

    async def fetch_release(self, ref: BlobRef) -> bytearray:
        return await self.fetch(ref, stream=RELEASES, prefix=self._subjects.release_blob)

    async def fetch_from(self, region: str, ref: BlobRef, *, stream: str, prefix: Prefix) -> bytearray:
        """A blob from a region's own stream: it need not have reached the hub yet."""
        return await read_blob(Source(self._broker, stream, domain=region), prefix, ref)

    async def fetch_update(self, sink: Sink, update: StoredUpdate) -> None:
        await get_blob(self._source(update), update.prefix(self._subjects, self._config.run), update.blob, sink)

    def stream_update(self, update: StoredUpdate, from_byte: int = 0) -> AsyncIterator[bytes]:
        """The chunks of an update in order, from the one that begins at `from_byte`."""
        prefix = update.prefix(self._subjects, self._config.run)
        return stream_blob(self._source(update), prefix, update.blob, from_byte)

    def _source(self, update: StoredUpdate) -> Source:
        if update.stays:
            return Source(self._broker, STAY, domain=update.region)
        return Source(self._broker, up_stream(update.region))

    async def read(self, stream: str, subject: str) -> bytes | None:
        found = await self._broker.last(stream, subject)
        return None if found is None else found.data

    async def write(self, subject: str, data: bytes) -> None:
        """Store one message; retried until the broker is reachable."""
        await until_done(log, "storage.write_waits", lambda: self._broker.publish(subject, data), subject=subject)

    async def forget_updates(self, digests: Iterable[str] | None = None) -> None:
        """Delete the run's folded updates (None: all) from the hub and the regions (they expire anyway)."""
        updates = None if digests is None else list(digests)
        await self._purge(self._purge_of(updates=updates, staying=updates if self._config.spec.policy.regional else []))

    async def forget_anchors(self) -> None:
        """Delete the anchor models, once the run has ended."""
        if self.anchors:
            await self._purge(self._purge_of(models=[ref.digest for ref in self.anchors]))

    async def forget(self, models: Iterable[BlobRef], states: Iterable[BlobRef]) -> None:
        """Delete models of rounds from the hub and every region's cache, and parts of checkpoints."""
        named = {"models": sorted({r.digest for r in models}), "states": sorted({r.digest for r in states})}
        if any(named.values()):
            await self._purge(self._purge_of(**named))

    def _purge_of(self, **what: Any) -> Purge:
        return Purge(attempt=self._config.attempt, **what)

    async def _purge(self, what: Purge) -> None:
        try:
            subject = self._subjects.asked_by_run(self._config.run, "purge")
            await self._broker.ask(subject, to_json(what), timeout_s=PURGE_WITHIN_S)
        except FedtideError as exc:
            log.info("grid.purge_left_to_expiry", extra={"reason": str(exc)})
