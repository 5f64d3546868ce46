"""Updates that are folded while they arrive: what breaks off goes on or is taken back, and no byte of it stays."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedtide.aggregation.config import WorkerConfig
from fedtide.aggregation.folding.in_flight import Node
from fedtide.aggregation.folding.ingest import Ingest, RefusedUpdate
from fedtide.aggregation.folding.regions import Regions
from fedtide.aggregation.folding.shards import Shards
from fedtide.aggregation.folding.storage import StoredUpdate
from fedtide.aggregation.sums.agreement import Agreement
from fedtide.aggregation.sums.round_sum import RoundSum, Weight
from fedtide.aggregation.sums.weighted_sum import Partial
from fedtide.fabric.errors import DigestMismatch, TransientError
from fedtide.fabric.messages.fold import FoldEntry, FoldFault
from fedtide.fabric.messages.tasks import Arrays, Reply, Values, WireMessage
from fedtide.fabric.nats.subjects import Subjects
from fedtide.fabric.plans.run_spec import AppRef, RunSpec
from fedtide.fabric.tensors.blobs import BlobRef
from fedtide.fabric.tensors.frame import Tensor, encode

APP = AppRef(name="a", bundle=BlobRef(digest="0" * 64, size_bytes=1))
CHUNK = 64 * 1024
NOWHERE = "nats://127.0.0.1:1"
SIZE = 100_000


class Stored:
    """A broker's blobs, as chunks; `breaks` says at which chunk a reading breaks off, and how."""

    def __init__(self) -> None:
        self.blobs: dict[str, bytes] = {}
        self.breaks: dict[int, Exception] = {}
        self.read: list[int] = []
        self.reached = asyncio.Event()
        self.go_on = asyncio.Event()
        self.go_on.set()

    def put(self, array: np.ndarray) -> BlobRef:
        frame = b"".join(encode([Tensor.of("w", array)]))
        digest = f"{len(self.blobs):064x}"
        self.blobs[digest] = frame
        return BlobRef(digest=digest, size_bytes=len(frame))

    async def stream_update(self, update: StoredUpdate, from_byte: int = 0) -> AsyncIterator[bytes]:
        for start in range(from_byte, update.blob.size_bytes, CHUNK):
            number = start // CHUNK
            if number in self.breaks:
                raise self.breaks.pop(number)
            if number == 3:
                self.reached.set()
                await self.go_on.wait()
            self.read.append(number)
            yield self.blobs[update.blob.digest][start : start + CHUNK]


class Setting:
    def __init__(self, folder: Path) -> None:
        self.stored = Stored()
        self.sum = RoundSum(Agreement.of([Tensor.of("w", np.zeros(SIZE, "f4"))], 8))
        regions = Regions(None, Subjects(), self.stored, "r")
        config = WorkerConfig(
            run="r", attempt=1, spec=RunSpec(app=APP), nats_url="nats://127.0.0.1:1", work_dir=folder, regions=[]
        )
        shards = Shards(None, self.stored, config)
        self.ingest = Ingest(self.stored, regions, shards, folder)
        self.ingest.fold_into(lambda reply, size: self.sum.expect(reply.task, Weight(2.0, 2.0), size))
        self.wanted = True

    def reply(self, task: str, array: np.ndarray) -> Reply:
        content = {
            "arrays": Arrays(blob=self.stored.put(array)),
            "metrics": Values(kind="metrics", values={"num-examples": 2}),
        }
        message = WireMessage(
            run_id=1,
            message_id="",
            src_node_id=1,
            dst_node_id=2,
            created_at=0,
            ttl=1,
            message_type="train",
            content=content,
        )
        return Reply(task=task, run="r", node="n", seconds=1, message=message)

    async def take(self, reply: Reply) -> Any:
        return await self.ingest.read(reply, Node.of("n", "eu"), lambda: self.wanted)

    def holds_only(self, array: np.ndarray) -> bool:
        clean = RoundSum(self.sum.total.agreement)
        clean.add([[Tensor.of("w", array)]], [Weight(2.0, 2.0)])
        same = self.sum.total.terms == 1 and self.sum.total.weight == self.sum.share == 2
        return same and [bytes(t.data) for t in self.sum.total.mean()] == [bytes(t.data) for t in clean.total.mean()]


@pytest.fixture
def setting(tmp_path: Path) -> Setting:
    return Setting(tmp_path)


def _draw(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(SIZE).astype("f4")


async def test_a_reading_that_breaks_off_goes_on_where_it_was(setting: Setting) -> None:
    reply = setting.reply("t", _draw(1))
    setting.stored.breaks[4] = TransientError("the broker went away")
    with pytest.raises(TransientError):
        await setting.take(reply)
    assert not setting.sum.holds("t")
    assert await setting.take(reply) is None
    assert setting.sum.holds("t")
    assert setting.stored.read == [0, 1, 2, 3, 4, 5, 6]
    assert setting.holds_only(_draw(1))


@pytest.mark.parametrize("failure", ["nan", "tampered", "unwanted"])
async def test_what_must_not_count_is_taken_back_without_a_trace(setting: Setting, failure: str) -> None:
    bad = _draw(2) * 1000
    if failure == "nan":
        bad[-1] = np.nan
    if failure == "tampered":
        setting.stored.breaks[5] = DigestMismatch("chunk 5 does not match its digest")
    setting.wanted = failure != "unwanted"
    with pytest.raises((RefusedUpdate, DigestMismatch)):
        await setting.take(setting.reply("bad", bad))
    setting.wanted = True
    await setting.take(setting.reply("good", _draw(1)))
    assert setting.holds_only(_draw(1))


async def test_a_phase_that_ends_takes_back_what_is_half_there(setting: Setting) -> None:
    await setting.take(setting.reply("whole", _draw(1)))
    setting.stored.reached.clear()
    setting.stored.go_on.clear()
    taking = asyncio.create_task(setting.take(setting.reply("half", _draw(2))))
    await setting.stored.reached.wait()
    settling = asyncio.create_task(setting.ingest.settle())
    await asyncio.sleep(0)  # lets `settle` say that the phase is over, before the reading goes on
    setting.stored.go_on.set()
    with pytest.raises(RefusedUpdate, match="still arriving"):
        await taking
    await settling
    assert setting.holds_only(_draw(1))


async def test_a_broken_reading_is_taken_back_when_its_phase_ends(setting: Setting) -> None:
    setting.stored.breaks[4] = TransientError("the broker went away")
    with pytest.raises(TransientError):
        await setting.take(setting.reply("half", _draw(2)))
    await setting.take(setting.reply("whole", _draw(1)))
    setting.stored.breaks[2] = TransientError("and again")
    await setting.ingest.settle()
    assert setting.holds_only(_draw(1))


async def test_an_update_of_another_form_is_refused_at_its_header(setting: Setting) -> None:
    with pytest.raises(RefusedUpdate, match="shape"):
        await setting.take(setting.reply("t", np.zeros(SIZE + 1, "f4")))
    assert setting.sum.total.terms == 0


class Region:
    """A region's aggregator that promises, and delivers no sum; or does not answer at all."""

    def __init__(self, *, answers: bool) -> None:
        self.answers = answers

    async def fold(self, entry: FoldEntry) -> FoldFault | None:
        if not self.answers:
            raise TransientError("the region does not answer")
        return FoldFault(category="not_finite", reason="NaN") if entry.task == "bad" else None

    async def collect(self, region: str, entries: Sequence[FoldEntry]) -> Partial:
        assert (region, [entry.task for entry in entries]) == ("eu", ["good"])
        raise TransientError("the region does not answer any more")


@pytest.mark.parametrize("answers", [True, False])
async def test_what_a_region_does_not_deliver_is_summed_here(setting: Setting, answers: bool) -> None:
    setting.ingest.regions = Region(answers=answers)
    stays = {"stays": True}
    await setting.take(setting.reply("good", _draw(1)).model_copy(update=stays))
    bad = setting.reply("bad", _draw(2) if answers else np.full(SIZE, np.nan, "f4")).model_copy(update=stays)
    with pytest.raises(RefusedUpdate, match="NaN"):
        await setting.take(bad)
    assert setting.sum.holds("good") and not setting.sum.holds("bad")
    await setting.ingest.settle(setting.sum)
    assert setting.holds_only(_draw(1))
