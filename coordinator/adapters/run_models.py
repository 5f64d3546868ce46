"""Models of runs that have made no release: from their checkpoints, for runs that start from them."""

from __future__ import annotations

from fedtide.fabric.encoding import from_json
from fedtide.fabric.errors import MalformedMessage, NotFound
from fedtide.fabric.messages.checkpoints import CheckpointedModels, Elsewhere, ModelAfter
from fedtide.fabric.nats.broker import Broker
from fedtide.fabric.nats.subjects import CHECKPOINTS, DOWN, Subjects
from fedtide.fabric.nats.transfer import Prefix, Source, put_blob, read_blob
from fedtide.fabric.tensors.blobs import BlobRef


class RunModels:
    """Reads checkpoints, and stores a model of them where an aggregator may read it."""

    def __init__(self, broker: Broker, subjects: Subjects) -> None:
        self._broker = broker
        self._subjects = subjects

    async def model(self, run: str, number: int | None) -> BlobRef:
        """The model of a run after a round (None: after its last one), as a frame beside the bundles.

        Raises:
            NotFound: nothing of the run, or of this round, is kept.
        """
        kept = await self._kept(run)
        found = next((each for each in kept if number in (None, each.round)), None)
        if found is None:
            rounds = ", ".join(str(each.round) for each in kept) or "none"
            asked = "a checkpoint" if number is None else f"a checkpoint of round {number}"
            raise NotFound(f"run {run!r} has not {asked}", f"Kept are those after rounds: {rounds}")
        frame = found.arrays.inline
        if found.arrays.blob is not None:
            frame = bytes(await read_blob(Source(self._broker, DOWN), self._of_round(run), found.arrays.blob))
        return await put_blob(self._broker, self._subjects.blob, DOWN, [frame or b""], ttl_s=None)

    def _of_round(self, run: str) -> Prefix:
        return lambda digest: self._subjects.round_blob(run, digest)

    async def _kept(self, run: str) -> list[ModelAfter]:
        """The last model first, then the best one."""
        stage, found = 1, None
        while (raw := await self._record(run, "head" if stage == 1 else f"head-{stage}")) is not None:
            stage, found = stage + 1, raw
        if found is None:
            return []
        models = from_json(CheckpointedModels, found, "checkpoint")
        return [models, *([models.best] if models.best is not None else [])]

    async def _record(self, run: str, name: str) -> bytes | None:
        stored = await self._broker.last(CHECKPOINTS, self._subjects.checkpoint(run, name))
        if stored is None:
            return None
        try:
            ref = from_json(Elsewhere, stored.data, name).elsewhere
        except MalformedMessage:
            return stored.data
        prefix: Prefix = lambda digest: self._subjects.checkpoint_blob(run, digest)  # noqa: E731
        return bytes(await read_blob(Source(self._broker, CHECKPOINTS), prefix, ref))
