"""Reads the tensors of a reply from the broker: into a file, or chunk by chunk into the round's sum.

Each update of a sum is completed, or withdrawn before the sum is used (`sum_ledger`).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from pathlib import Path

from fedtide.aggregation.config import WorkerConfig
from fedtide.aggregation.folding.fold_client import Sign
from fedtide.aggregation.folding.in_flight import Node, RefusalCategory
from fedtide.aggregation.folding.regions import Regions
from fedtide.aggregation.folding.shards import Shards
from fedtide.aggregation.folding.storage import Storage, StoredUpdate
from fedtide.aggregation.folding.sum_ledger import (
    SHARDS,
    Actions,
    Arrived,
    ArrivedFor,
    Ask,
    BrokenOff,
    Drop,
    Fold,
    Folded,
    FoldInstead,
    Lost,
    Merged,
    NoAnswer,
    Promised,
    Refused,
    SumLedger,
    Withdraw,
    Withdrawn,
)
from fedtide.aggregation.sums.admission import Refusal
from fedtide.aggregation.sums.round_sum import RoundSum, StreamingUpdate
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
    """Reads one update at a time, and does what `sum_ledger` says of each that is folded."""

    def __init__(self, storage: Storage, regions: Regions, shards: Shards, folder: Path) -> None:
        self._storage = storage
        self._folder = folder
        self._expect: Expect | None = None
        self._ledger = SumLedger()
        self._updates: dict[str, tuple[StreamingUpdate, StoredUpdate]] = {}
        self._one_at_a_time = asyncio.Lock()
        self._closing = False
        self.regions = regions
        self.shards = shards

    @classmethod
    def of(cls, broker: Broker, storage: Storage, config: WorkerConfig, sign: Sign) -> Ingest:
        """For one run; `sign` as of `Regions`."""
        regions = Regions(broker, Subjects(config.tenant), storage, config.run, sign)
        return cls(storage, regions, Shards(broker, storage, config), config.work_dir / "incoming")

    def fold_into(self, expect: Expect | None) -> None:
        """Fold updates on arrival from now on, using `expect`; None: receive them whole."""
        self._expect = expect
        self._closing = False
        self._ledger = SumLedger()  # what the one before knows belongs to an abandoned sum
        self._updates.clear()

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
        async with self._one_at_a_time:
            if self._closing:
                raise _too_late()
            if reply.task not in self._updates:
                incoming = self._expect(reply, blob.size_bytes)
                if isinstance(incoming, Refusal):
                    raise RefusedUpdate(incoming.category, incoming.reason)
                self._updates[reply.task] = incoming, StoredUpdate(blob, node.region, node.name, reply.stays)
            place = SHARDS if self.shards.active else node.region if reply.stays else None
            arrived = Arrived(reply.task) if place is None else ArrivedFor(reply.task, place)
            await self._carry_out(self._ledger.step(arrived), wanted)
        return None

    async def _carry_out(self, actions: Actions, wanted: Callable[[], bool] = lambda: False) -> None:
        """Do what the ledger asks for, in order; raises as `read`."""
        for action in actions:
            match action:
                case Ask():
                    await self._ask(action, wanted)
                case Fold():
                    await self._fold(action.task, wanted)
                case FoldInstead():
                    await self._fold_instead(action.task)
                case Drop():
                    self._updates.pop(action.task)[0].drop()
                case Withdraw():
                    await self._withdraw(action.task)

    async def settle(self, total: RoundSum | None = None) -> None:
        """Settle the sum before its use: withdraw partially folded updates, and fold nothing more.

        Args:
            total: the sum that the sums of regions and shards are merged into.

        Raises:
            FedtideError: an update to add or to withdraw is unreachable; the sum cannot be used.
        """
        self._closing = True
        async with self._one_at_a_time:
            await self._carry_out(self._ledger.close())
            if total is not None:
                for place, tasks in self._ledger.elsewhere().items():
                    await self._merge(place, tasks, total)
            self._expect = None

    async def _ask(self, ask: Ask, wanted: Callable[[], bool]) -> None:
        try:
            fault = await (self.shards if ask.place == SHARDS else self.regions).fold(self._entry(ask.task))
            if fault is not None:
                raise RefusedUpdate(fault.category, fault.reason)
            if self._closing or not wanted():
                raise _too_late()
        except TransientError as exc:
            log.warning("ingest.place_does_not_sum", extra={"place": ask.place or "shards", "reason": str(exc)})
            await self._carry_out(self._ledger.step(NoAnswer(ask.task)), wanted)
            if not self._ledger.counts(ask.task):
                raise  # the reply comes again
        except Exception:  # whatever it is: nothing of it may stay in the sum, and it is raised again
            await self._carry_out(self._ledger.step(Refused(ask.task)))
            raise
        else:
            self._updates[ask.task][0].promise()
            await self._carry_out(self._ledger.step(Promised(ask.task)))

    def _entry(self, task: str) -> FoldEntry:
        incoming, update = self._updates[task]
        return FoldEntry(
            task=task,
            region=update.region,
            node=update.node,
            stays=update.stays,
            blob=update.blob,
            term=incoming.weight.term,
        )

    async def _merge(self, place: str, tasks: Sequence[str], total: RoundSum) -> None:
        """Merge the sum of a place. What a region does not deliver is folded here: the result is the same."""
        entries = [self._entry(task) for task in tasks]
        if place == SHARDS:
            await self.shards.finish(entries, total.total)
        else:
            try:
                total.total.merge(await self.regions.collect(place, entries))
            except (TransientError, MalformedMessage) as exc:
                log.warning("ingest.place_does_not_sum", extra={"place": place, "reason": str(exc)})
                for task in tasks:
                    await self._carry_out(self._ledger.step(Lost(task)))
                return
        for task in tasks:
            self._ledger.step(Merged(task))

    async def _fold_instead(self, task: str) -> None:
        incoming, update = self._updates[task]
        again = incoming.anew()

        async def feed() -> None:
            async for chunk in self._storage.stream_update(update, again.fed):
                await asyncio.to_thread(again.feed, chunk)

        try:
            await until_done(log, "ingest.update_waits", feed, give_up_after_s=OUT_OF_REACH_S, task=task)
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
        incoming, update = self._updates[task]
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
            await self._carry_out(self._ledger.step(BrokenOff(task)))
            raise
        except Exception:  # whatever it is: nothing of it may stay in the sum
            await self._carry_out(self._ledger.step(Refused(task)))
            raise
        await self._carry_out(self._ledger.step(Folded(task)))
        del self._updates[task]

    async def _withdraw(self, task: str) -> None:
        incoming, update = self._updates[task]
        taking = incoming.withdrawal()

        async def take() -> None:
            if taking.fed >= incoming.fed:
                return
            async for chunk in self._storage.stream_update(update, taking.fed):
                await asyncio.to_thread(taking.feed, chunk)
                if taking.fed >= incoming.fed:
                    break

        try:
            await until_done(log, "ingest.withdrawal_waits", take, give_up_after_s=OUT_OF_REACH_S, task=task)
        except TransientError as exc:
            raise FedtideError(f"an update of {update.node} cannot be taken back: {exc}") from exc
        taking.done()
        self._ledger.step(Withdrawn(task))
        del self._updates[task]


def _too_late() -> RefusedUpdate:
    return RefusedUpdate("timeout", "was still arriving when its phase ended")


def _foldable(reply: Reply) -> BlobRef | None:
    """The blob of a reply that has a single, uncoded array record stored as a blob; else None."""
    arrays = [r for r in (reply.message.content or {}).values() if isinstance(r, Arrays)]
    return arrays[0].blob if len(arrays) == 1 and not arrays[0].coded else None
