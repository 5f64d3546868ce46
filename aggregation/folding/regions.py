"""The aggregator's side of regional aggregation: which regions sum, and their sums.

Owns no sum: it returns partial sums, or raises if a region is unreachable.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterable, Sequence
from fractions import Fraction

from fedtide.aggregation.folding.fold_client import Sign, ask, in_steps, instance_of, unsigned
from fedtide.aggregation.folding.fold_worker import plan_of
from fedtide.aggregation.folding.storage import Storage
from fedtide.aggregation.sums.agreement import Agreement
from fedtide.aggregation.sums.weighted_sum import Partial
from fedtide.fabric.errors import NotFound, RemoteError, TransientError
from fedtide.fabric.messages.fold import FoldAnswer, FoldEntry, FoldFault, FoldPlan, FoldRequest
from fedtide.fabric.messages.usage import MOST_CPUS, MOST_MEMORY, Usage
from fedtide.fabric.nats.broker import Broker
from fedtide.fabric.nats.subjects import FOLD_WORKER, UP, Subjects
from fedtide.fabric.tensors.frame import decode

log = logging.getLogger(__name__)


class Regions:
    """One run's partial sums, for one round after the other."""

    def __init__(self, broker: Broker, subjects: Subjects, storage: Storage, run: str, sign: Sign = unsigned) -> None:
        """`sign`: what tells regions who asks."""
        self._broker = broker
        self._sign = sign
        self._subjects = subjects
        self._storage = storage
        self._run = run
        self._plan: FoldPlan | None = None
        self._used: dict[str, Usage] = {}

    def take_used(self) -> dict[str, Usage]:
        """What regional aggregators have used for this run since this was asked last, by region, as they say."""
        used, self._used = self._used, {}
        return used

    async def begin(self, key: str, agreement: Agreement, regions: Iterable[str]) -> frozenset[str]:
        """Begin a round. Returns the `regions` whose fold worker answers."""
        self._plan = plan_of(agreement, self._run, key)
        names = list(regions)
        there = await asyncio.gather(*(self._is_there(region) for region in names))
        return frozenset(region for region, answers in zip(names, there, strict=True) if answers)

    async def fold(self, entry: FoldEntry) -> FoldFault | None:
        """Have the region of an update add it to its sum.

        Raises:
            TransientError: it did not answer.
        """
        answer = await self._ask(entry.region, FoldRequest(plan=self._plan, entries=[entry]))
        return answer.faults.get(entry.task)

    async def collect(self, region: str, entries: Sequence[FoldEntry]) -> Partial:
        """The region's sum of exactly these updates.

        Raises:
            TransientError: the region did not answer, or cannot deliver the sum.
        """
        assert self._plan is not None
        for step in in_steps(self._plan, entries):
            await self._ask(region, step)
        answer = await self._ask(region, FoldRequest(plan=self._plan, entries=list(entries), finish="sum"))
        weight = sum((Fraction(entry.term) for entry in entries), Fraction(0))
        if answer.faults or answer.result is None or (answer.terms, answer.weight) != (len(entries), str(weight)):
            raise TransientError(f"the aggregator of {region} holds {answer.terms} of {len(entries)} updates")
        prefix = lambda digest: self._subjects.update_blob(region, FOLD_WORKER, self._run, digest)  # noqa: E731
        try:
            frame = await self._storage.fetch_from(region, answer.result, stream=UP, prefix=prefix)
        except (NotFound, RemoteError) as exc:
            raise TransientError(f"the sum of {region}: {exc.what}") from exc
        return Partial(decode(memoryview(frame)), weight, answer.terms)

    async def _is_there(self, region: str) -> bool:
        try:
            await instance_of(self._broker, self._subject(region))
        except TransientError:
            return False
        return True

    async def _ask(self, region: str, request: FoldRequest) -> FoldAnswer:
        began = time.monotonic()
        answer = await ask(self._broker, self._subject(region), request, f"the aggregator of {region}", self._sign)
        used = answer.usage.at_most(time.monotonic() - began, MOST_CPUS, MOST_MEMORY)
        self._used[region] = self._used.get(region, Usage()) + used
        return answer

    def _subject(self, region: str) -> str:
        return self._subjects.fold(region)
