"""Reads the tensors of a reply from the broker: into a file, or chunk by chunk into the round's sum.

Owns partially folded updates: each is completed, or withdrawn before the sum is used.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from pathlib import Path

from fedtide.aggregation.config import WorkerConfig
from fedtide.aggregation.folding.in_flight import Node, RefusalCategory
from fedtide.aggregation.folding.regions import Regions
from fedtide.aggregation.folding.shards import Shards
from fedtide.aggregation.folding.storage import Storage, StoredUpdate
from fedtide.aggregation.sums.admission import Refusal
from fedtide.aggregation.sums.round_sum import RoundSum, StreamingUpdate, UpdateRollback, Weight
from fedtide.fabric.errors import FedtideError, MalformedMessage, TransientError
from fedtide.fabric.messages.fold import FoldEntry
from fedtide.fabric.messages.tasks import Arrays, Reply
from fedtide.fabric.nats.broker import Broker
from fedtide.fabric.nats.subjects import Subjects
from fedtide.fabric.nats.transfer import FileSink
from fedtide.fabric.process.files import map_file
from fedtide.fabric.process.retry import until_done
from fedtide.fabric.tensors.blobs import BlobRef
from fedtide.fabric.tensors.frame import Buffer

log = logging.getLogger(__name__)

FILE_BYTES = 1024 * 1024
"""Larger frames are received into files, so that waiting replies take no memory."""

OUT_OF_REACH_S = 60.0
"""How long a round waits for an unreachable region that holds updates already counted."""

Expect = Callable[[Reply, int], StreamingUpdate | Refusal]
"""(reply, frame size in bytes) -> the started fold, or the refusal. Raises MalformedMessage."""


class RefusedUpdate(FedtideError):
    """An update is refused; the sum contains nothing of it."""

    def __init__(self, category: RefusalCategory, reason: str) -> None:
        super().__init__(reason)
        self.category = category


class Ingest:
    """Reads one update at a time."""

    def __init__(self, storage: Storage, regions: Regions, shards: Shards, folder: Path) -> None:
        self._storage = storage
        self._folder = folder
        self._expect: Expect | None = None
        self._partial: dict[str, tuple[StreamingUpdate, StoredUpdate]] = {}
        self._withdrawals: dict[str, UpdateRollback] = {}
        self._one_at_a_time = asyncio.Lock()
        self._closing = False
        self.regions = regions
        self.shards = shards

    @classmethod
    def of(cls, broker: Broker, storage: Storage, config: WorkerConfig) -> Ingest:
        """For one run."""
        regions = Regions(broker, Subjects(config.tenant), storage, config.run)
        return cls(storage, regions, Shards(broker, storage, config), config.work_dir / "incoming")

    def fold_into(self, expect: Expect | None) -> None:
        """Fold updates on arrival from now on, using `expect`; None: receive them whole."""
        self._expect = expect
        self._closing = False
        self._partial.clear()  # these belong to an abandoned sum
        self._withdrawals.clear()

    async def read(self, reply: Reply, node: Node, wanted: Callable[[], bool]) -> dict[str, Buffer] | None:
        """The frames of a reply by digest; None if they were folded instead.

        Args:
            wanted: whether the reply is still awaited.

        Raises:
            RefusedUpdate: the update does not fit the sum.
            TransientError: the broker is unreachable; call again to resume.
        """
        blob = _foldable(reply)
        if blob is None and self._expect is not None and self.shards.active and reply.message.content is not None:
            raise RefusedUpdate("malformed", "the shards sum updates of one plain blob, and this is none")
        if self._expect is None or blob is None:
            refs = reply.message.blobs()
            return {r.digest: await self._receive(StoredUpdate(r, node.region, node.name, reply.stays)) for r in refs}
        update = StoredUpdate(blob, node.region, node.name, reply.stays)
        async with self._one_at_a_time:
            if self._closing:
                raise _too_late()
            if reply.task not in self._partial:
                incoming = self._expect(reply, blob.size_bytes)
                if isinstance(incoming, Refusal):
                    raise RefusedUpdate(incoming.category, incoming.reason)
                if (reply.stays or self.shards.active) and await self._hand_over(reply.task, incoming, update, wanted):
                    return None
                self._partial[reply.task] = (incoming, update)
            await self._fold(reply.task, wanted)
        return None

    async def settle(self, total: RoundSum | None = None) -> None:
        """Settle the sum before its use: withdraw partially folded updates, and fold nothing more.

        Args:
            total: the sum that the sums of regions and shards are merged into.

        Raises:
            FedtideError: an update to add or to withdraw is unreachable; the sum cannot be used.
        """
        self._closing = True
        async with self._one_at_a_time:
            for task in list(self._partial):
                await self._withdraw(task)
            if total is not None:
                for region in list(self.regions.promised):
                    await self._merge(region, total)
                if self.shards.promised:
                    await self.shards.finish(total.total)
            self._expect = None

    async def _hand_over(
        self, task: str, incoming: StreamingUpdate, update: StoredUpdate, wanted: Callable[[], bool]
    ) -> bool:
        """Ask the region or the shards to sum an update; False if the region cannot."""
        entry = FoldEntry(
            task=task,
            region=update.region,
            node=update.node,
            stays=update.stays,
            blob=update.blob,
            term=incoming.weight.term,
        )
        try:
            fault = await (self.shards if self.shards.active else self.regions).fold(entry)
        except TransientError as exc:
            if self.shards.active:
                incoming.drop()
                raise
            log.warning("ingest.region_does_not_sum", extra={"region": update.region, "reason": str(exc)})
            return False
        if fault is not None:
            incoming.drop()
            raise RefusedUpdate(fault.category, fault.reason)
        if self._closing or not wanted():
            # The fold worker withdraws updates that the final request does not list.
            self.regions.promised.get(update.region, {}).pop(task, None)
            self.shards.promised.pop(task, None)
            incoming.drop()
            raise _too_late()
        incoming.promise()
        return True

    async def _merge(self, region: str, total: RoundSum) -> None:
        """Merge a region's sum, or else fold its updates here; the result is the same to the byte."""
        try:
            total.total.merge(await self.regions.collect(region))
        except (TransientError, MalformedMessage) as exc:
            log.warning("ingest.region_does_not_sum", extra={"region": region, "reason": str(exc)})
            for entry in self.regions.promised[region].values():
                await self._fold_promised(StoredUpdate(entry.blob, region, entry.node, stays=True), entry, total)
        del self.regions.promised[region]

    async def _fold_promised(self, update: StoredUpdate, entry: FoldEntry, total: RoundSum) -> None:
        incoming = total.expect(entry.task, Weight(entry.term, 0.0), entry.blob.size_bytes)

        async def feed() -> None:
            async for chunk in self._storage.stream_update(update, incoming.fed):
                await asyncio.to_thread(incoming.feed, chunk)

        try:
            await until_done(log, "ingest.update_waits", feed, give_up_after_s=OUT_OF_REACH_S, task=entry.task)
        except TransientError as exc:
            raise FedtideError(f"{update.region} holds an update that counts, and is out of reach: {exc}") from exc

    async def _receive(self, update: StoredUpdate) -> Buffer:
        if update.blob.size_bytes < FILE_BYTES:
            chunks = [chunk async for chunk in self._storage.stream_update(update)]
            return b"".join(chunks)
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / update.blob.digest
        await self._storage.fetch_update(FileSink(path), update)
        frame = map_file(path)
        path.unlink()
        return frame

    async def _fold(self, task: str, wanted: Callable[[], bool]) -> None:
        incoming, update = self._partial[task]
        try:
            async for chunk in self._storage.stream_update(update, incoming.fed):
                refusal = await asyncio.to_thread(incoming.feed, chunk)
                if refusal is not None:
                    raise RefusedUpdate(refusal.category, refusal.reason)
                if self._closing or not wanted():
                    raise _too_late()
            if self._closing or not wanted():  # the end of the stream may have been late
                raise _too_late()
            incoming.accept()
        except TransientError:
            raise
        except FedtideError:
            await self._withdraw(task)
            raise
        del self._partial[task]

    async def _withdraw(self, task: str) -> None:
        incoming, update = self._partial[task]
        taking = self._withdrawals.setdefault(task, incoming.withdrawal())

        async def take() -> None:
            if taking.fed >= incoming.fed:
                return
            async for chunk in self._storage.stream_update(update, taking.fed):
                await asyncio.to_thread(taking.feed, chunk)
                if taking.fed >= incoming.fed:
                    break

        await until_done(log, "ingest.withdrawal_waits", take, task=task)
        taking.done()
        del self._partial[task], self._withdrawals[task]


def _too_late() -> RefusedUpdate:
    return RefusedUpdate("timeout", "was still arriving when its phase ended")


def _foldable(reply: Reply) -> BlobRef | None:
    """The blob of a reply that has a single, uncoded array record stored as a blob; else None."""
    arrays = [r for r in (reply.message.content or {}).values() if isinstance(r, Arrays)]
    return arrays[0].blob if len(arrays) == 1 and not arrays[0].coded else None
