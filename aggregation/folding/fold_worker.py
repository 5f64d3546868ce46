"""Fold worker: sums updates for a remote aggregator, those of one region or one shard of a large model.

`python -m fedtide.aggregation.folding.fold_worker CONFIG`.
Holds one sum per run, in memory only. After a restart the updates
are folded again on the next request. Independent of Flower and of strategies.
"""

from __future__ import annotations

import asyncio
import logging
import sys
from collections.abc import AsyncIterator
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import Field

from fedtide.aggregation.sums.admission import Refusal
from fedtide.aggregation.sums.agreement import Agreement
from fedtide.aggregation.sums.fixed_point import FixedPoint
from fedtide.aggregation.sums.round_sum import RoundSum, StreamingUpdate, UpdateRollback, Weight
from fedtide.fabric import logs
from fedtide.fabric.encoding import from_json, to_json
from fedtide.fabric.errors import BrokerUnavailable, ConfigError, FedtideError, MalformedMessage, NotFound, RemoteError
from fedtide.fabric.ids import new_id
from fedtide.fabric.messages.fold import FoldAnswer, FoldEntry, FoldFault, FoldPlan, FoldRequest
from fedtide.fabric.messages.usage import Usage
from fedtide.fabric.nats.broker import Broker
from fedtide.fabric.nats.credentials import Access
from fedtide.fabric.nats.jetstream import Received
from fedtide.fabric.nats.subjects import FOLD_WORKER, HUB_REGION, STAY, UP, Subjects, up_stream
from fedtide.fabric.nats.transfer import Source, put_blob, stream_blob
from fedtide.fabric.nats.urls import NatsUrl
from fedtide.fabric.nats.worker_meter import WorkerMeter
from fedtide.fabric.process.until_signalled import until_signalled
from fedtide.fabric.strict import Strict
from fedtide.fabric.tensors.blobs import CHUNK_BYTES
from fedtide.fabric.tensors.frame import TensorSpec, encode
from fedtide.fabric.trust.chain import Chain, order_path
from fedtide.fabric.trust.link import TrustLink
from fedtide.fabric.trust.refusals import Untrusted
from fedtide.fabric.trust.signatures import Vouched
from fedtide.fabric.trust.store import TrustStore

log = logging.getLogger(__name__)

IDLE_S = 900.0
"""How long a sum is kept without requests; a later request rebuilds it."""


class FoldWorkerConfig(Strict):
    """Read from a JSON file."""

    name: str = Field(description="Its region, or the name that an aggregator has given it")
    run: str = Field(default="", description="The run whose aggregator has started it; empty: it is a region's")
    region: str = Field(description="Region whose leaf server it connects to; `hub`: the hub")
    nats_url: NatsUrl = Field(description="The server that it connects to")
    tenant: str = Field(default="default", description="As for agents")
    credentials: Path | None = Field(default=None, description="Its `.creds` file")
    ca_file: Path | None = Field(default=None, description="Authority of the broker's certificate; needed for tls://")
    trust_root: Path | None = Field(
        default=None,
        description="The root that a region's worker follows (trust-root.json); none: it believes anybody",
    )
    data_dir: Path | None = Field(default=None, description="Where it keeps the metadata that it has verified")

    @property
    def access(self) -> Access:
        return Access(self.credentials, self.ca_file)


@dataclass(slots=True)
class _Sum:
    key: str
    total: RoundSum
    expiry: asyncio.TimerHandle
    held: dict[str, FoldEntry] = field(default_factory=dict)
    faults: dict[str, FoldFault] = field(default_factory=dict)
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)


class FoldWorker:
    """Answers fold requests; one at a time for each run."""

    def __init__(self, config: FoldWorkerConfig, broker: Broker, meter: WorkerMeter) -> None:
        self._trust = _trust_of(config, broker)
        self._path = order_path(config.region, FOLD_WORKER)
        self._meter = meter
        self._working = 0
        self._name = config.name
        self._run = config.run
        self._region = config.region
        self._broker = broker
        self._subjects = Subjects(config.tenant)
        self._instance = new_id("fold")
        self._sums: dict[str, _Sum] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    async def listen(self) -> None:
        subject = self._subjects.shard(self._run, self._name) if self._run else self._subjects.fold(self._name)
        await self._broker.subscribe(subject, self._on_request)

    async def _on_request(self, message: Received) -> None:
        # A ping must not wait behind a long fold.
        task = asyncio.create_task(self._respond(message))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _respond(self, message: Received) -> None:
        if not self._working:
            self._meter.leave()
        self._working += 1
        request = None
        try:
            request = from_json(FoldRequest, message.data, "request")
            if request.plan is not None:
                await self._check(message, request.plan)
            answer = await self._answer(request.plan, request) if request.plan is not None else FoldAnswer()
        except FedtideError as exc:
            log.warning("fold.failed", extra={"reason": str(exc)})
            answer = FoldAnswer(error=str(exc))
        except Exception as exc:  # the requester must always get an answer
            log.exception("fold.crashed")
            answer = FoldAnswer(error=f"{type(exc).__name__}: {exc}")
        finally:
            self._working -= 1
        # A shard belongs to its run's aggregator, which counts it with itself. A ping asks while others are at work.
        is_work = request is not None and request.plan is not None
        used = self._meter.take() if is_work and not self._run else Usage()
        answer = answer.model_copy(update={"instance": self._instance, "usage": used})
        await self._broker.respond(message, to_json(answer))

    async def _check(self, message: Received, plan: FoldPlan) -> None:
        """Raises Untrusted: whoever asks has no mandate of that run."""
        trust = self._trust
        if trust is None:
            return

        def ordered(chain: Chain, now: float) -> Vouched:
            return trust.messages.check(chain, self._path, message.subject, message.data, message.headers, now)

        vouched = await trust.verified(ordered)
        if vouched is not None and (vouched.mandate is None or vouched.mandate.run != plan.run):
            raise Untrusted("wrong_target", f"whoever asks to fold for run {plan.run} has no mandate of it")

    async def _answer(self, plan: FoldPlan, request: FoldRequest) -> FoldAnswer:
        while True:
            sum_ = self._sum_for(plan)
            async with sum_.lock:
                if self._sums.get(plan.run) is sum_:  # else: dropped while waiting for the lock
                    return await self._work(sum_, plan, request)

    def _sum_for(self, plan: FoldPlan) -> _Sum:
        sum_ = self._sums.get(plan.run)
        if sum_ is None or sum_.key != plan.key:
            sum_ = self._sums[plan.run] = _Sum(
                plan.key, RoundSum(agreement_of(plan), shard=plan.shard), asyncio.get_running_loop().call_later(0, int)
            )
        return sum_

    async def _work(self, sum_: _Sum, plan: FoldPlan, request: FoldRequest) -> FoldAnswer:
        sum_.expiry.cancel()
        try:
            return await self._bring_up(sum_, plan, request)
        except BaseException:
            # The content of the sum is unknown now: drop it. The next request rebuilds it.
            self._forget(sum_, plan.run)
            raise
        finally:
            sum_.expiry = asyncio.get_running_loop().call_later(IDLE_S, self._forget, sum_, plan.run)

    def _forget(self, sum_: _Sum, run: str) -> None:
        if self._sums.get(run) is sum_:
            del self._sums[run]

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
        total = sum_.total.total
        weight, terms = str(total.weight), total.terms
        # Taking the mean ends the round and empties the sum. With a total weight of 0 there is no mean.
        blocks = (
            total.partial().tensors if request.finish == "sum" else list(total.mean_blocks() if total.weight else ())
        )
        prefix = lambda digest: self._subjects.update_blob(self._region, FOLD_WORKER, plan.run, digest)  # noqa: E731
        blob = await put_blob(self._broker, prefix, UP, encode(blocks), ttl_s=None, stored=set())
        if request.finish == "mean":
            self._forget(sum_, plan.run)
        log.info("fold.forwarded", extra={"sum": plan.key, "updates": terms, "bytes": blob.size_bytes})
        return FoldAnswer(faults=faults, result=blob, weight=weight, terms=terms)

    async def _fold(self, sum_: _Sum, run: str, entry: FoldEntry) -> Refusal | None:
        incoming = sum_.total.expect(entry.task, Weight(entry.term, entry.term), entry.blob.size_bytes)
        refusal: Refusal | None = None
        try:
            async for chunk in self._wanted(run, entry, incoming):
                refusal = await asyncio.to_thread(incoming.feed, chunk)
                if refusal is not None:
                    break
            else:
                incoming.accept()
        except (RemoteError, NotFound) as exc:
            refusal = Refusal("malformed", exc.what)
        if refusal is not None and incoming.fed:
            await self._withdraw(sum_, run, entry, incoming.fed)
        elif refusal is not None:
            incoming.drop()
        return refusal

    async def _withdraw(self, sum_: _Sum, run: str, entry: FoldEntry, upto: int) -> None:
        taking = sum_.total.withdrawal(Weight(entry.term, entry.term), entry.blob.size_bytes)
        # A malformed frame fails at the same byte as before; nothing after that byte was added.
        with suppress(MalformedMessage):
            async for chunk in self._wanted(run, entry, taking):
                await asyncio.to_thread(taking.feed, chunk)
                if taking.fed >= upto:
                    break
        taking.done()

    async def _wanted(self, run: str, entry: FoldEntry, to: StreamingUpdate | UpdateRollback) -> AsyncIterator[bytes]:
        """The chunks that overlap this worker's shard; `to` skips the others."""
        at_hub = self._region == HUB_REGION
        stream = STAY if entry.stays else up_stream(entry.region) if at_hub else UP
        source = Source(self._broker, stream, domain=None if at_hub else self._broker.streams_of(self._region))
        where = self._subjects.stay_blob if entry.stays else self._subjects.update_blob
        prefix = lambda digest: where(entry.region, entry.node, run, digest)  # noqa: E731
        async for chunk in stream_blob(source, prefix, entry.blob):
            yield chunk
            if to.specs is not None:
                break
        if to.specs is None:
            raise MalformedMessage("tensor frame: ends before its header does")
        first = to.fed
        wanted = to.wanted_chunks(CHUNK_BYTES)
        rest = [k for k in wanted if k * CHUNK_BYTES >= first]
        async for chunk in stream_blob(source, prefix, entry.blob, chunks=rest):
            to.skip_to(rest.pop(0) * CHUNK_BYTES)
            yield chunk
        to.skip_to(entry.blob.size_bytes)


def agreement_of(plan: FoldPlan) -> Agreement:
    """Raises MalformedMessage if the plan contradicts itself."""
    if len(plan.specs) != len(plan.points):
        raise MalformedMessage("fold plan: not one fixed point for each tensor")
    specs = tuple(TensorSpec(name, dtype, tuple(shape)) for name, dtype, shape in plan.specs)
    points = tuple(FixedPoint(*point) if point is not None else None for point in plan.points)
    return Agreement(specs, points, plan.max_terms)


def plan_of(agreement: Agreement, run: str, key: str, shard: tuple[int, int] = (0, 1)) -> FoldPlan:
    """The inverse of `agreement_of`."""
    return FoldPlan(
        key=key,
        run=run,
        specs=[(s.name, s.dtype, list(s.shape)) for s in agreement.specs],
        points=[(p.exponent, p.term_bits) if p is not None else None for p in agreement.points],
        max_terms=agreement.max_terms,
        shard=shard,
    )


def _trust_of(config: FoldWorkerConfig, broker: Broker) -> TrustLink | None:
    """Of a region's worker; those of a run belong to its aggregator, and are reached by nobody else.

    Raises:
        ConfigError: the root cannot be read.
    """
    if config.run or config.trust_root is None:
        return None
    if not config.trust_root.exists():  # its Secret is of a version that knew of no root
        log.warning("fold.follows_no_root", extra={"file": str(config.trust_root)})
        return None
    try:
        root = config.trust_root.read_text(encoding="utf-8")
    except OSError as exc:
        raise ConfigError("trust_root", f"cannot be read: {exc.strerror}", "fedtide fleet region REGION") from exc
    folder = config.data_dir or config.trust_root.parent / f"trust-of-{config.name}"
    question = Subjects(config.tenant).orders(config.region, FOLD_WORKER)
    return TrustLink(TrustStore(folder, root), broker, question, order_path(config.region, FOLD_WORKER))


async def _serve(config: FoldWorkerConfig) -> None:
    broker = await Broker.connect(config.nats_url, f"fold-worker-{config.name}", config.access, wait_s=None)
    meter = WorkerMeter()
    await FoldWorker(config, broker, meter).listen()
    log.info("fold.ready", extra={"worker": config.name})
    subject = Subjects(config.tenant).telemetry(config.region, FOLD_WORKER)
    async with nullcontext() if config.run else meter.telling(broker, subject):
        await broker.until_closed()


def main() -> int:
    """Serve until a signal, or until the connection has ended for good: then only a new process can go on."""
    logs.to_stderr()
    try:
        if asyncio.run(until_signalled(_serve(FoldWorkerConfig.model_validate_json(Path(sys.argv[1]).read_bytes())))):
            return 0
    except FedtideError as exc:
        log.error("fold.ended", extra={"reason": str(exc)})
        return exc.exit_code
    return BrokerUnavailable.exit_code


if __name__ == "__main__":
    sys.exit(main())
