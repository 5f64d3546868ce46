"""The partial aggregator beside a region's leaf: sums what its region's nodes send, and forwards one sum.

Runs as `python -m aggregation.regional_aggregator CONFIG`. Holds one sum a run, in memory only: what
it had is folded anew when a run asks after a restart. It knows neither Flower nor strategies.
"""

from __future__ import annotations

import asyncio
import logging
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import ValidationError

from aggregation.admission import Refusal
from aggregation.fixed_point import FixedPoint
from aggregation.round_sum import RoundSum, Weight
from aggregation.weighted_sum import Agreement
from fabric import logs
from fabric.broker import Broker
from fabric.errors import FedtideError, MalformedMessage, NotFound, RemoteError
from fabric.fold_requests import FoldAnswer, FoldEntry, FoldFault, FoldPlan, FoldRequest
from fabric.jetstream import Received
from fabric.subjects import STAY, UP, Subjects
from fabric.tensors import TensorSpec, encode
from fabric.transfer import Source, put_blob, stream_blob
from fabric.wire import Strict

log = logging.getLogger(__name__)

PARTIAL_TTL_S = 24 * 3600.0
FOLDER = "fold"
"""Stands for the node in the subjects of partial sums."""


class RegionalConfig(Strict):
    """Read from a JSON file."""

    region: str
    nats_url: str
    tenant: str = "default"


@dataclass(slots=True)
class _Sum:
    key: str
    total: RoundSum
    held: dict[str, FoldEntry] = field(default_factory=dict)
    faults: dict[str, FoldFault] = field(default_factory=dict)
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)


class RegionalAggregator:
    """Answers fold requests; one at a time for each run."""

    def __init__(self, config: RegionalConfig, broker: Broker) -> None:
        self._region = config.region
        self._broker = broker
        self._subjects = Subjects(config.tenant)
        self._sums: dict[str, _Sum] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    async def listen(self) -> None:
        await self._broker.subscribe(self._subjects.rpc(f"fold.{self._region}"), self._on_request)

    async def _on_request(self, message: Received) -> None:
        # A question whether anyone is here must not wait behind a long fold.
        task = asyncio.create_task(self._respond(message))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _respond(self, message: Received) -> None:
        try:
            request = FoldRequest.model_validate_json(message.data)
            answer = await self._answer(request.plan, request) if request.plan is not None else FoldAnswer()
        except ValidationError as exc:
            answer = FoldAnswer(error=f"request: {exc.errors()[0]['msg']}")
        except FedtideError as exc:
            log.warning("fold.failed", extra={"reason": str(exc)})
            answer = FoldAnswer(error=str(exc))
        await self._broker.tell(message.reply, answer.model_dump_json().encode())

    async def _answer(self, plan: FoldPlan, request: FoldRequest) -> FoldAnswer:
        sum_ = self._sums.get(plan.run)
        if sum_ is None or sum_.key != plan.key:
            sum_ = self._sums[plan.run] = _Sum(plan.key, RoundSum(agreement_of(plan)))
        async with sum_.lock:
            try:
                return await self._bring_up(sum_, plan, request)
            except FedtideError:
                # What is in the sum is not known any more: it is made anew when it is asked for again.
                self._sums.pop(plan.run, None)
                raise

    async def _bring_up(self, sum_: _Sum, plan: FoldPlan, request: FoldRequest) -> FoldAnswer:
        for entry in request.entries:
            if entry.task not in sum_.held and entry.task not in sum_.faults:
                refusal = await self._fold(sum_, plan.run, entry)
                if refusal is None:
                    sum_.held[entry.task] = entry
                else:
                    sum_.faults[entry.task] = FoldFault(category=refusal.category, reason=refusal.reason)
        wanted = {e.task for e in request.entries}
        faults = {t: f for t, f in sum_.faults.items() if t in wanted}
        if not request.finish:
            return FoldAnswer(faults=faults)
        for task in [t for t in sum_.held if t not in wanted]:
            entry = sum_.held.pop(task)
            await self._withdraw(sum_, plan.run, entry, entry.blob.size_bytes)
        partial = sum_.total.total.partial()
        prefix = lambda digest: self._subjects.update_blob(self._region, FOLDER, plan.run, digest)  # noqa: E731
        blob = await put_blob(self._broker, prefix, UP, encode(partial.tensors), ttl_s=PARTIAL_TTL_S)
        log.info("fold.forwarded", extra={"sum": plan.key, "updates": partial.terms, "bytes": blob.size_bytes})
        return FoldAnswer(faults=faults, partial=blob, weight=str(partial.weight), terms=partial.terms)

    async def _fold(self, sum_: _Sum, run: str, entry: FoldEntry) -> Refusal | None:
        incoming = sum_.total.expect(entry.task, Weight(entry.term, entry.term), entry.blob.size_bytes)
        refusal: Refusal | None = None
        try:
            async for chunk in self._chunks(run, entry):
                refusal = await asyncio.to_thread(incoming.feed, chunk)
                if refusal is not None:
                    break
            else:
                incoming.accept()
        except (RemoteError, NotFound) as exc:
            refusal = Refusal("malformed", exc.what)
        if refusal is not None:
            await self._withdraw(sum_, run, entry, incoming.fed)
        return refusal

    async def _withdraw(self, sum_: _Sum, run: str, entry: FoldEntry, left: int) -> None:
        taking = sum_.total.withdrawal(Weight(entry.term, entry.term), entry.blob.size_bytes)
        if left:
            async for chunk in self._chunks(run, entry):
                await asyncio.to_thread(taking.feed, chunk)
                left -= len(chunk)
                if left <= 0:
                    break
        taking.done()

    def _chunks(self, run: str, entry: FoldEntry) -> AsyncIterator[bytes]:
        prefix = lambda digest: self._subjects.stay_blob(self._region, entry.node, run, digest)  # noqa: E731
        return stream_blob(Source(self._broker, STAY), prefix, entry.blob)


def agreement_of(plan: FoldPlan) -> Agreement:
    """Raises MalformedMessage if the plan contradicts itself."""
    if len(plan.specs) != len(plan.points):
        raise MalformedMessage("fold plan: not one fixed point for each tensor")
    specs = tuple(TensorSpec(name, dtype, tuple(shape)) for name, dtype, shape in plan.specs)
    points = tuple(FixedPoint(*point) if point is not None else None for point in plan.points)
    return Agreement(specs, points, plan.max_terms)


def plan_of(agreement: Agreement, run: str, key: str) -> FoldPlan:
    """The inverse."""
    return FoldPlan(
        key=key,
        run=run,
        specs=[(s.name, s.dtype, list(s.shape)) for s in agreement.specs],
        points=[(p.exponent, p.term_bits) if p is not None else None for p in agreement.points],
        max_terms=agreement.max_terms,
    )


async def _serve(config: RegionalConfig) -> None:
    broker = await Broker.connect(config.nats_url, f"regional-aggregator-{config.region}", wait_s=None)
    await RegionalAggregator(config, broker).listen()
    log.info("fold.ready", extra={"region": config.region})
    await asyncio.Event().wait()


def main() -> int:
    logs.to_stderr()
    asyncio.run(_serve(RegionalConfig.model_validate_json(Path(sys.argv[1]).read_bytes())))
    return 0


if __name__ == "__main__":
    sys.exit(main())
