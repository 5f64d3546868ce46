"""Sharded aggregation: k processes beside the aggregator, each of which sums one shard of the model.

Owns these processes. If one dies, its successor folds its updates again. The aggregator itself never holds
more than the model and its mean.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from fractions import Fraction
from typing import Literal

from fedtide.aggregation.config import WorkerConfig
from fedtide.aggregation.folding.fold_client import ask, in_steps, instance_of
from fedtide.aggregation.folding.fold_worker import FoldWorkerConfig, plan_of
from fedtide.aggregation.folding.storage import Storage
from fedtide.aggregation.sums.agreement import Agreement
from fedtide.aggregation.sums.weighted_sum import WeightedSum
from fedtide.fabric.errors import TransientError
from fedtide.fabric.messages.fold import FoldAnswer, FoldEntry, FoldFault, FoldPlan, FoldRequest
from fedtide.fabric.messages.tasks import INLINE_BYTES
from fedtide.fabric.nats.broker import Broker
from fedtide.fabric.nats.subjects import FOLD_WORKER, HUB_REGION, UP, Subjects
from fedtide.fabric.process.parent_death import die_with_parent
from fedtide.fabric.process.python import module_command
from fedtide.fabric.process.retry import until_done
from fedtide.fabric.tensors.frame import decode

log = logging.getLogger(__name__)

_RESTARTS = 3
_STARTS_WITHIN_S = 60.0


class Shards:
    """The shard workers of one run, started in the first round that needs them."""

    def __init__(self, broker: Broker, storage: Storage, config: WorkerConfig) -> None:
        self._broker = broker
        self._subjects = Subjects(config.tenant)
        self._storage = storage
        self._config = config
        self._count = config.spec.policy.shards
        self._plans: list[FoldPlan] = []
        self._workers: dict[int, asyncio.subprocess.Process] = {}

    @property
    def active(self) -> bool:
        """Whether the present round is summed in shards."""
        return bool(self._plans)

    async def begin(self, key: str, agreement: Agreement) -> None:
        """Begin a round. Missing workers are started while nodes train."""
        # Models small enough to travel inside messages are not sharded.
        large = sum(s.size_bytes for s in agreement.specs) > INLINE_BYTES
        shards = [(number, self._count) for number in range(self._count)] if self._count > 1 and large else []
        self._plans = [plan_of(agreement, self._config.run, key, shard) for shard in shards]
        for number in range(len(shards)):
            await self._ensure_started(number)

    async def fold(self, entry: FoldEntry) -> FoldFault | None:
        """Have every shard add its part of one update.

        Raises:
            TransientError: a worker does not answer, even after restarts.
        """
        answers = await self._every([entry], "")
        faults = [a.faults[entry.task] for a in answers if entry.task in a.faults]
        return faults[0] if faults else None

    async def finish(self, entries: Sequence[FoldEntry], total: WeightedSum) -> None:
        """Put the mean of exactly these updates into `total`, shard by shard.

        Raises:
            TransientError: as above.
        """
        for answer in await self._every(entries, "mean"):
            if answer.result is None or answer.terms != len(entries) or answer.faults:
                raise TransientError(f"a shard holds {answer.terms} of {len(entries)} updates")
            prefix = lambda d: self._subjects.update_blob(HUB_REGION, FOLD_WORKER, self._config.run, d)  # noqa: E731
            frame = await self._storage.fetch(answer.result, stream=UP, prefix=prefix)
            total.adopt(decode(memoryview(frame)), Fraction(answer.weight), answer.terms)

    async def stop(self) -> None:
        """End the workers."""
        for worker in self._workers.values():
            if worker.returncode is None:
                worker.kill()
            await worker.wait()
        self._workers.clear()

    async def _every(self, entries: Sequence[FoldEntry], finish: Literal["", "mean"]) -> list[FoldAnswer]:
        return list(await asyncio.gather(*(self._ask(k, entries, finish) for k in range(self._count))))

    async def _ask(self, number: int, entries: Sequence[FoldEntry], finish: Literal["", "mean"]) -> FoldAnswer:
        plan, who = self._plans[number], f"shard {number}"
        for again in range(_RESTARTS + 1):
            await self._until_there(number)
            try:
                for step in in_steps(plan, entries) if finish else []:
                    await ask(self._broker, self._subject(number), step, who)
                request = FoldRequest(plan=plan, entries=list(entries), finish=finish)
                return await ask(self._broker, self._subject(number), request, who)
            except TransientError as exc:
                if again == _RESTARTS:
                    raise
                log.warning("shard.asked_again", extra={"number": number, "reason": str(exc)})
        raise AssertionError("the last try returns or raises")

    async def _until_there(self, number: int) -> None:
        async def is_there() -> None:
            await self._ensure_started(number)
            await instance_of(self._broker, self._subject(number))

        try:  # a starting process gives no signal when it is ready
            await until_done(log, "shard.starts", is_there, give_up_after_s=_STARTS_WITHIN_S, number=number)
        except TransientError as exc:
            what = f"shard {number} of {self._count} does not answer"
            raise TransientError(what, "See shard.log of the run") from exc

    async def _ensure_started(self, number: int) -> None:
        worker = self._workers.get(number)
        if worker is None or worker.returncode is not None:
            self._workers[number] = await self._start(number)

    async def _start(self, number: int) -> asyncio.subprocess.Process:
        config = FoldWorkerConfig(
            name=self._name(number),
            run=self._config.run,
            region=HUB_REGION,
            nats_url=self._config.nats_url,
            tenant=self._config.tenant,
            credentials=self._config.credentials,
            ca_file=self._config.ca_file,
        )
        file = self._config.work_dir / f"shard-{number}.json"
        file.write_text(config.model_dump_json())
        log.info("shard.starts", extra={"number": number})
        with (self._config.work_dir / "shard.log").open("ab") as logfile:
            return await asyncio.create_subprocess_exec(
                *module_command("fedtide.aggregation.folding.fold_worker"),
                str(file.resolve()),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=logfile,
                stderr=logfile,
                preexec_fn=die_with_parent,
            )

    def _name(self, number: int) -> str:
        # Workers of an earlier attempt that still runs must not answer for this one.
        return f"{self._config.run}-a{self._config.attempt}-shard-{number}"

    def _subject(self, number: int) -> str:
        return self._subjects.shard(self._config.run, self._name(number))
