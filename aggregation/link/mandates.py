"""The right of this process to speak for its run: asked of the director, and asked again in time."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import NoReturn

from fedtide.aggregation.config import WorkerConfig
from fedtide.fabric.encoding import from_json, to_json
from fedtide.fabric.messages.run_questions import MandateGiven, MandateWanted
from fedtide.fabric.nats.broker import Broker
from fedtide.fabric.nats.subjects import Subjects
from fedtide.fabric.process.retry import until_done
from fedtide.fabric.trust.signatures import RunSigner

log = logging.getLogger(__name__)

End = Callable[[int], NoReturn]
"""Ends this process at once with an exit code, without waiting for Flower's thread."""
SUPERSEDED_CODE = 76
"""Exit code of an aggregator that is not its run's current attempt, or whose run is over."""
RENEW_AFTER_S = 12 * 3600.0
"""A mandate is good for a day at least."""
ANSWER_WITHIN_S = 5.0


class Mandates:
    """`signer` signs tasks and fold orders; without a mandate, where nothing is signed, it signs nothing."""

    def __init__(self, broker: Broker, config: WorkerConfig, end: End) -> None:
        self._broker = broker
        self._config = config
        self._end = end
        self._director: str | None = None
        self._asked = 0.0
        self.signer = RunSigner()

    async def renew(self) -> None:
        """Ask until there is an answer; ends this process if it is not the run's current attempt."""
        wanted = MandateWanted(attempt=self._config.attempt, key=self.signer.key)
        subject = Subjects(self._config.tenant).asked_by_run(self._config.run, "mandate")
        ask = lambda: self._broker.ask(subject, to_json(wanted), timeout_s=ANSWER_WITHIN_S)  # noqa: E731
        given = from_json(MandateGiven, await until_done(log, "mandate.waits", ask), "mandate")
        if given.superseded:
            log.critical("grid.superseded", extra={"run": self._config.run, "attempt": self._config.attempt})
            self._end(SUPERSEDED_CODE)
        self.signer.mandate, self._asked = given.mandate, time.monotonic()

    async def keep_fresh(self, director: str) -> None:
        """Ask again if it ends soon, or if others give mandates now. `director`: the ids of their keys."""
        changed = self._director is not None and director != self._director
        self._director = director
        if changed or time.monotonic() > self._asked + RENEW_AFTER_S:
            await self.renew()
