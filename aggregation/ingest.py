"""How the tensors of a reply come from the broker: into a file, or piece by piece into the round's sum.

Owns updates that are only partly in the sum: each is finished, or taken back before the sum is used.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from pathlib import Path

from aggregation.admission import Refusal
from aggregation.in_flight import Loss
from aggregation.round_sum import Incoming
from aggregation.storage import RETRY_S, Storage
from fabric.blobs import BlobRef
from fabric.errors import FedtideError, TransientError
from fabric.subjects import UP
from fabric.tensors import Buffer
from fabric.transfer import FileSink, Prefix, map_file
from fabric.wire import Arrays, Reply, Values

log = logging.getLogger(__name__)

FILE_BYTES = 1024 * 1024
"""Larger frames are received into files: however many wait, memory does not grow."""

Expect = Callable[[str, Values, int], Incoming | Refusal]
"""From a task, its reply's metrics and the size of its frame: how to fold it, or why not."""


class Refused(FedtideError):
    """An update that must not count; the sum is as it was before it came."""

    def __init__(self, category: Loss, reason: str) -> None:
        super().__init__(reason)
        self.category = category


class Ingest:
    """Reads one update at a time."""

    def __init__(self, storage: Storage, folder: Path) -> None:
        self._storage = storage
        self._folder = folder
        self._expect: Expect | None = None
        self._partial: dict[str, tuple[Incoming, BlobRef, Prefix]] = {}
        self._one_at_a_time = asyncio.Lock()
        self._closing = False

    def fold_into(self, expect: Expect | None) -> None:
        """From here on updates are folded as they arrive, if they can be."""
        self._expect = expect
        self._closing = False

    async def read(self, reply: Reply, prefix: Prefix, wanted: Callable[[], bool]) -> dict[str, Buffer] | None:
        """The frames of a reply by digest; None if they were folded instead.

        Args:
            wanted: whether anyone still waits for it.

        Raises:
            Refused: it does not fit the sum.
            TransientError: the broker went away; call again to go on.
        """
        metrics, blob = _foldable(reply)
        if self._expect is None or metrics is None or blob is None:
            return {ref.digest: await self._receive(ref, prefix) for ref in reply.message.blobs()}
        async with self._one_at_a_time:
            if self._closing:
                raise _too_late()
            await self._fold(reply.task, metrics, blob, prefix, self._expect, wanted)
        return None

    async def settle(self) -> None:
        """The sum is about to be used: what is only partly in it is taken back, and nothing more is folded.

        Raises:
            FedtideError: the broker has lost what is to be taken back: the sum cannot be used.
        """
        self._closing = True
        async with self._one_at_a_time:
            for task in list(self._partial):
                await self._withdraw(task)
            self._expect = None

    async def _receive(self, ref: BlobRef, prefix: Prefix) -> Buffer:
        if ref.size_bytes < FILE_BYTES:
            return memoryview(await self._storage.fetch(ref, stream=UP, prefix=prefix)).toreadonly()
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / ref.digest
        await self._storage.fetch_into(FileSink(path), ref, stream=UP, prefix=prefix)
        frame = map_file(path)
        path.unlink()
        return frame

    async def _fold(
        self, task: str, metrics: Values, blob: BlobRef, prefix: Prefix, expect: Expect, wanted: Callable[[], bool]
    ) -> None:
        if task not in self._partial:
            incoming = expect(task, metrics, blob.size_bytes)
            if isinstance(incoming, Refusal):
                raise Refused(incoming.category, incoming.reason)
            self._partial[task] = (incoming, blob, prefix)
        incoming = self._partial[task][0]
        try:
            async for chunk in self._chunks(blob, prefix, incoming.fed):
                refusal = await asyncio.to_thread(incoming.feed, chunk)
                if refusal is not None:
                    raise Refused(refusal.category, refusal.reason)
                if self._closing or not wanted():
                    raise _too_late()
            incoming.accept()
        except TransientError:
            raise
        except FedtideError:
            await self._withdraw(task)
            raise
        del self._partial[task]

    async def _withdraw(self, task: str) -> None:
        incoming, blob, prefix = self._partial[task]
        left = incoming.fed
        taking = incoming.withdrawal(blob.size_bytes)
        while left:
            try:
                async for chunk in self._chunks(blob, prefix, incoming.fed - left):
                    await asyncio.to_thread(taking.feed, chunk)
                    left -= len(chunk)
                    if not left:
                        break
            except TransientError as exc:
                log.warning("ingest.withdrawal_waits", extra={"task": task, "reason": str(exc)})
                await asyncio.sleep(RETRY_S)
        taking.done()
        del self._partial[task]

    def _chunks(self, blob: BlobRef, prefix: Prefix, from_byte: int) -> AsyncIterator[bytes]:
        return self._storage.stream(blob, stream=UP, prefix=prefix, from_byte=from_byte)


def _too_late() -> Refused:
    return Refused("timeout", "was still arriving when its phase ended")


def _foldable(reply: Reply) -> tuple[Values | None, BlobRef | None]:
    """The only metrics and the only arrays of a reply, if there is one of each, and the arrays are a plain blob."""
    records = list((reply.message.content or {}).values())
    metrics = [r for r in records if isinstance(r, Values) and r.kind == "metrics"]
    arrays = [r for r in records if isinstance(r, Arrays)]
    if len(metrics) != 1 or len(arrays) != 1 or arrays[0].coded:
        return None, None
    return metrics[0], arrays[0].blob
