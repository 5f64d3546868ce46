"""Answers what aggregators ask the coordinator: cohorts, consumers for replies, and the deletion of what they stored.

An aggregator has no right to JetStream's API of streams that others use: a request there is carried out with the
server's rights, and says in its body what it is about. Here the run is that of the subject, which the broker
guarantees. An aggregator that was given up (its coordinator was frozen when another took over) learns here that it
must end.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from decimal import Decimal

from pydantic import BaseModel

from fedtide.coordinator import bookkeeping
from fedtide.coordinator.adapters.director import Director
from fedtide.coordinator.adapters.run_logs import RunLogs
from fedtide.coordinator.log.engine import Engine
from fedtide.coordinator.runs import rounds, runs, selection
from fedtide.fabric.encoding import from_json, to_json
from fedtide.fabric.errors import FedtideError, MalformedMessage, NotFound
from fedtide.fabric.messages.run_questions import (
    BacklogQuestion,
    Cohort,
    CohortQuestion,
    MandateGiven,
    MandateWanted,
    Member,
    Purge,
    Purged,
    RepliesReady,
    RepliesWanted,
    ReplyBacklog,
)
from fedtide.fabric.nats.broker import Broker
from fedtide.fabric.nats.jetstream import Received
from fedtide.fabric.nats.subjects import (
    CHECKPOINTS,
    DOWN,
    HUB_REGION,
    STAY,
    UP,
    RunAsks,
    Subjects,
    parse_as,
    reply_consumer,
    up_stream,
)

log = logging.getLogger(__name__)

PURGES_AT_ONCE = 32
SETTLES_WITHIN_S = 3.0
GRANTED_S = 60.0
"""So long a round may take from the answer that it may begin until it is open."""
Answerer = Callable[[str, bytes], Awaitable[BaseModel]]


class RunStreams:
    """What the streams of the hub and of regions hold for one run."""

    def __init__(self, broker: Broker, subjects: Subjects, regions: Sequence[str]) -> None:
        self._broker = broker
        self._subjects = subjects
        self._regions = regions

    async def take_over_replies(self, run: str) -> None:
        """Make the run's consumers, each at the position that it had."""
        for region in self._regions:
            pattern = self._subjects.replies(region, run)
            await self._broker.take_over(up_stream(region), reply_consumer(run), pattern)

    async def backlog(self, run: str) -> ReplyBacklog:
        durable = reply_consumer(run)
        there = [await self._broker.backlog(up_stream(region), durable) for region in self._regions]
        return ReplyBacklog(waiting=sum(w for w, _ in there), unacknowledged=sum(u for _, u in there))

    async def remove(self, run: str, *, keeps_checkpoints: bool) -> None:
        """Delete the run's consumers, and all that is stored for it at the hub.

        Args:
            keeps_checkpoints: what the run may go on from stays.
        """
        for region in (HUB_REGION, *self._regions):
            stream = up_stream(region)
            await self._broker.delete_consumer(stream, reply_consumer(run))
            await self._broker.purge(stream, self._subjects.replies(region, run))
            await self._broker.purge(stream, self._subjects.update_blobs(region, run))
        if not keeps_checkpoints:
            await self._broker.purge(DOWN, self._subjects.round_blobs(run))
            await RunLogs(self._broker, self._subjects).keep(run)
            await self._broker.purge(CHECKPOINTS, self._subjects.checkpoints(run))
            return
        # Of the round under way: the run goes on with a new selection.
        for what in ("order", "mark", "plan-train", "plan-evaluate"):
            await self._broker.purge(CHECKPOINTS, self._subjects.checkpoint(run, what))

    async def purge(self, run: str, asked: Purge) -> Purged:
        """Delete at the hub and in the regions; what is in those that do not answer is swept later."""
        left: set[str] = set()
        window = asyncio.Semaphore(PURGES_AT_ONCE)

        async def delete(stream: str, pattern: str, domain: str | None) -> None:
            try:
                async with window:
                    await self._broker.purge(stream, pattern, domain=domain)
            except FedtideError as exc:
                log.info("purge.left_to_sweep", extra={"run": run, "domain": domain, "reason": str(exc)})
                left.add(domain or HUB_REGION)

        await asyncio.gather(*(delete(*each) for each in self._asked_to_go(run, asked)))
        return Purged(left=sorted(left))

    def _asked_to_go(self, run: str, asked: Purge) -> Iterator[tuple[str, str, str | None]]:
        """Stream, subjects and domain of what is to be deleted."""
        for digest in asked.updates if asked.updates is not None else ["*"]:
            for region in (HUB_REGION, *self._regions):
                yield up_stream(region), self._subjects.update_blobs(region, run, digest), None
            for region in self._regions:
                yield UP, self._subjects.update_blobs(region, run, digest), region
        for digest in asked.staying if asked.staying is not None else ["*"]:
            for region in self._regions:
                yield STAY, self._subjects.stay_blobs(region, run, digest), region
        for digest in asked.models:
            for domain in (None, *self._regions):
                yield DOWN, f"{self._subjects.round_blob(run, digest)}.>", domain
        for digest in asked.states:
            yield CHECKPOINTS, f"{self._subjects.checkpoint_blob(run, digest)}.>", None


def _is_open(run: runs.Run, asked: CohortQuestion) -> bool:
    """Whether this trial of the round has begun: what has begun is brought to its end."""
    state = run.rounds.get(asked.round)
    return state is not None and state.trial == asked.trial and not isinstance(state, rounds.Abandoned)


class _Grants:
    """What is set aside for rounds that may begin: until they are open, no event says so."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._given: dict[str, tuple[float, dict[str, Decimal]]] = {}

    def why_not(self, run: str, number: int) -> str | None:
        """Why a round of a run may not begin, or None: then its cost is set aside, once for so long."""
        world, at, now = self._engine.world, datetime.now(UTC), time.monotonic()
        opened = {key for kept in world.budgets.values() for key in kept.reserved}
        self._given = {r: (t, g) for r, (t, g) in self._given.items() if r not in opened and now - t < GRANTED_S}
        by_budget: dict[str, dict[str, Decimal]] = {}
        for other, (_, given) in self._given.items():
            for budget, cost in given.items():
                by_budget.setdefault(budget, {})[other] = cost
        if (reason := bookkeeping.held(world, run, number, at, by_budget)) is not None:
            return reason
        if run not in self._given:
            self._given[run] = now, bookkeeping.grants(world, run, at)
        return None

    async def until_settled(self, run: str, number: int) -> str | None:
        """As `why_not`, once the report of the run's last round has arrived: a question overtakes it."""
        with self._engine.watch() as changed, suppress(TimeoutError):
            async with asyncio.timeout(SETTLES_WITHIN_S):
                while any(run in kept.reserved for kept in self._engine.world.budgets.values()):
                    if self.why_not(run, number) is None:
                        return None
                    await changed()
        return self.why_not(run, number)


class RunServices:
    """Answers aggregators while this coordinator leads."""

    def __init__(
        self, broker: Broker, subjects: Subjects, engine: Engine, streams: RunStreams, director: Director
    ) -> None:
        self._broker = broker
        self._subjects = subjects
        self._engine = engine
        self._streams = streams
        self._director = director
        self._grants = _Grants(engine)
        self._answers: Mapping[str, Answerer] = {
            "cohort": self._cohort,
            "mandate": self._mandate,
            "replies": self._replies,
            "backlog": self._backlog,
            "purge": self._purge,
        }

    async def listen(self) -> None:
        await self._broker.answer(self._subjects.asked_by_run("*", "*"), self._on_question)

    async def _on_question(self, message: Received) -> tuple[bytes, dict[str, str]]:
        asked = parse_as(RunAsks, message.subject)
        answers = self._answers.get(asked.verb)
        if answers is None:
            raise MalformedMessage(f"no run may ask for {asked.verb!r}")
        return to_json(await answers(asked.run, message.data)), {}

    async def _cohort(self, run: str, data: bytes) -> Cohort:
        question = from_json(CohortQuestion, data, "question")
        if question.run != run or not self._is_current(run, question.attempt):
            return Cohort(superseded=True)
        world = self._engine.world
        asking = selection.Asking(run, question.round, question.trial, question.phase)
        nodes, spec = world.nodes.values(), world.run(run).facts.spec
        online = [n.name for n in nodes if n.online]
        share = 1.0
        if question.phase and not _is_open(world.run(run), question):
            if (held := await self._grants.until_settled(run, question.round)) is not None:
                return Cohort(online=online, held=held, director=self._director.key_ids)
            share = bookkeeping.share_of_nodes(world, run, datetime.now(UTC))
        busy, least = world.tasks_of_others(run), question.needed
        chosen = selection.choose(nodes, spec, asking, busy, world.last_asked, share, least)
        return Cohort(
            nodes=[Member(name=n.name, region=n.region, codecs=n.capabilities.codecs) for n in chosen],
            online=online,
            director=self._director.key_ids,
        )

    async def _mandate(self, run: str, data: bytes) -> MandateGiven:
        asked = from_json(MandateWanted, data, "question")
        if not self._is_current(run, asked.attempt):
            return MandateGiven(superseded=True)
        spec = self._engine.world.run(run).facts.spec
        for_s = 2 * spec.policy.deadline_s * (1 + spec.policy.max_staleness)
        return MandateGiven(
            mandate=self._director.mandate(run, asked.attempt, spec.app.bundle.digest, asked.key, for_s)
        )

    async def _replies(self, run: str, data: bytes) -> RepliesReady:
        asked = from_json(RepliesWanted, data, "question")
        if not self._is_current(run, asked.attempt):
            return RepliesReady(superseded=True)
        await self._streams.take_over_replies(run)
        return RepliesReady()

    async def _backlog(self, run: str, data: bytes) -> ReplyBacklog:
        if not self._is_current(run, from_json(BacklogQuestion, data, "question").attempt):
            return ReplyBacklog(superseded=True)
        return await self._streams.backlog(run)

    async def _purge(self, run: str, data: bytes) -> Purged:
        asked = from_json(Purge, data, "purge")
        if not self._is_current(run, asked.attempt):  # one that was frozen: its successor has to read what is there
            return Purged(superseded=True)
        return await self._streams.purge(run, asked)

    def _is_current(self, run: str, attempt: int) -> bool:
        try:
            return runs.is_current(self._engine.world.run(run), attempt)
        except NotFound:
            return False
