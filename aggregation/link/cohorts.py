"""Asks the coordinator for cohorts: the nodes selected for a phase, and the nodes online."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from contextlib import suppress

from fedtide.aggregation.config import WorkerConfig
from fedtide.aggregation.link.mandates import SUPERSEDED_CODE, End, Mandates
from fedtide.fabric.encoding import from_json, to_json
from fedtide.fabric.messages.run_questions import Cohort, CohortQuestion
from fedtide.fabric.nats.broker import Broker
from fedtide.fabric.nats.subjects import Subjects
from fedtide.fabric.process.retry import until_done

log = logging.getLogger(__name__)

FRESH_S = 0.25
LOOK_AGAIN_S = 10.0
"""Presence messages are not stored and may be missed: ask again after this many seconds."""


class Cohorts:
    """Asks the coordinator; `news` is set when a node comes online or goes offline."""

    def __init__(self, broker: Broker, config: WorkerConfig, end: End, mandates: Mandates) -> None:
        self._broker = broker
        self._mandates = mandates
        self._config = config
        self._end = end
        self._question = Subjects(config.tenant).asked_by_run(config.run, "cohort")
        self.news = asyncio.Event()
        self.run_ends = False
        """Nothing is waited for any more."""
        self._last: tuple[float, frozenset[str]] = (0.0, frozenset())

    async def ask(self, round_: int, trial: int, phase: str, needed: int = 0) -> Cohort:
        """The cohort of a phase: the nodes to ask, of which `needed` are too few, and the nodes online.

        Ends this process if it is not the run's current attempt: two would take each other's replies.
        """
        run, attempt = self._config.run, self._config.attempt
        question = CohortQuestion(run=run, attempt=attempt, round=round_, trial=trial, phase=phase, needed=needed)
        raw = await until_done(
            log,
            "grid.waits_for_coordinator",
            lambda: self._broker.ask(self._question, to_json(question), timeout_s=5),
        )
        answer = from_json(Cohort, raw, "cohort")
        if answer.superseded:
            log.critical("grid.superseded", extra={"run": run, "attempt": attempt})
            self._end(SUPERSEDED_CODE)
        await self._mandates.keep_fresh(answer.director)
        self._last = asyncio.get_running_loop().time(), frozenset(answer.online)
        return answer

    async def online(self) -> frozenset[str]:
        """The online nodes; an answer younger than FRESH_S is used again."""
        asked_at, online = self._last
        if asyncio.get_running_loop().time() - asked_at < FRESH_S:
            return online
        return frozenset((await self.ask(0, 1, "")).online)

    async def at_least(
        self, needed: int, round_: int, trial: int, phase: str, tell: Callable[[int, str], Awaitable[None]]
    ) -> Cohort:
        """The cohort once it has `needed` nodes, or as it is at the round's deadline; a round that is held has none.

        Args:
            tell: hears how many nodes it has, and why it is held.
        """
        loop = asyncio.get_running_loop()
        told: tuple[int, str] | None = None
        deadline = loop.time() + self._config.spec.policy.deadline_s
        while True:
            self.news.clear()
            cohort = await self.ask(round_, trial, phase, needed)
            if self.run_ends:
                return cohort
            if cohort.held:
                deadline = loop.time() + self._config.spec.policy.deadline_s
            left = deadline - loop.time()
            if not cohort.held and (len(cohort.nodes) >= needed or left <= 0):
                return cohort
            if (len(cohort.nodes), cohort.held) != told:
                told = len(cohort.nodes), cohort.held
                log.info("grid.waits_for_nodes", extra={"there": told[0], "needed": needed, "held": cohort.held})
                await tell(*told)
            with suppress(TimeoutError):
                async with asyncio.timeout(min(left, LOOK_AGAIN_S)):
                    await self.news.wait()
