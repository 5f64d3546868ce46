"""Asks Prometheus what query gates want to know, while their wave bakes; each answer goes into the log.

https://prometheus.io/docs/prometheus/latest/querying/api/#instant-queries. Which servers there are is the coordinator's
configuration: whoever plans a roll-out cannot have it ask somebody else.
"""

from __future__ import annotations

import asyncio
import logging
import math
import ssl
from collections.abc import Iterator, Mapping
from contextlib import suppress
from datetime import datetime
from time import monotonic
from typing import Any, NamedTuple

import aiohttp
from pydantic_core import from_json

from fedtide.coordinator.config import Prometheus
from fedtide.coordinator.log.engine import Engine
from fedtide.coordinator.rollouts import gates, rollouts, waves
from fedtide.coordinator.state import World
from fedtide.fabric.errors import InvalidTransition
from fedtide.fabric.events.rollouts import QueryAnswered
from fedtide.fabric.plans.rollout_plan import UNANSWERED, QueryGate, QueryTemplate

log = logging.getLogger(__name__)

WITHIN_S = 10.0
TELL_AGAIN_S = 60.0
"""An answer that changes nothing is logged so often: that there is one counts."""
SETTLE_S = 0.2
"""Events come in bursts: one look at the roll-outs for all of them."""
MOST_BYTES = 1_000_000
"""Of one answer: a single value takes hundreds."""


class Question(NamedTuple):
    """One gate of one stage, in the bake that began then."""

    rollout: str
    region: str
    stage: str
    since: datetime
    gate: int


class GateQueries:
    """Asks each question that is open, at its own pace, until it is not."""

    def __init__(self, engine: Engine, servers: Mapping[str, Prometheus]) -> None:
        self._engine = engine
        self._servers = servers
        self._asking: set[Question] = set()

    async def keep(self) -> None:
        """For ever."""
        with self._engine.watch() as changed:
            async with asyncio.TaskGroup() as group:
                while True:
                    for question in open_questions(self._engine.world):
                        if question not in self._asking:
                            self._asking.add(question)
                            group.create_task(self._ask_on(question), name=f"query-{question.rollout}-{question.gate}")
                    await changed()
                    await asyncio.sleep(SETTLE_S)

    async def _ask_on(self, question: Question) -> None:
        try:
            told_at = -math.inf
            while (found := _baking(question, self._engine.world)) is not None:
                gate, wave = found
                try:
                    value, reason = await self._ask(question, gate)
                except Exception as exc:  # whatever a server answers must end no coordinator
                    log.exception("query.failed", extra={"rollout": question.rollout})
                    value, reason = None, f"the answer cannot be read: {type(exc).__name__}"
                before = wave.answers.get(str(question.gate), gates.UNASKED)
                if is_news(gate, before, value) or monotonic() >= told_at + TELL_AGAIN_S:
                    told_at = monotonic()
                    answered = QueryAnswered(**question._asdict(), value=value, reason=reason[:500])
                    with suppress(InvalidTransition):
                        await self._engine.submit(answered)
                await asyncio.sleep(gate.every_s)
        finally:
            self._asking.discard(question)

    async def _ask(self, question: Question, gate: QueryGate) -> tuple[float | None, str]:
        server = self._servers.get(gate.source)
        if server is None:  # it was taken out of the configuration meanwhile
            return None, f"this coordinator has no Prometheus {gate.source!r}"
        plan = self._engine.world.rollout(question.rollout).facts.plan
        names = {"model": plan.model, "version": plan.version, **question._asdict()}
        try:
            return value_of(await _answer(server, QueryTemplate(gate.query).safe_substitute(names)))
        except (OSError, TimeoutError, aiohttp.ClientError, ValueError) as exc:
            return None, f"{server.url} gives no answer: {type(exc).__name__} {exc}".strip()


def open_questions(world: World) -> Iterator[Question]:
    """What is to be asked now; of a roll-out that is paused too: it is judged by what holds when it goes on."""
    for key, rollout in world.rollouts.items():
        if not rollouts.is_open(rollout):
            continue
        plan = rollout.facts.plan
        asking = [number for number, gate in enumerate(plan.gates) if isinstance(gate, QueryGate)]
        for planned, wave in zip(plan.waves, rollout.waves, strict=True) if asking else ():
            if isinstance(wave, waves.Baking):
                yield from (Question(key, planned.region, wave.stage, wave.since, number) for number in asking)


def is_news(gate: QueryGate, before: gates.Answers, value: float | None) -> bool:
    """Whether an answer can decide more than those before it; a roll-out may be paused for weeks."""
    after = gates.after_answer(gate, before, value, "", before.at)
    return after.in_a_row == 1 or before.in_a_row < max(gate.times, UNANSWERED)


def _baking(question: Question, world: World) -> tuple[QueryGate, waves.Baking] | None:
    """The gate of a question that is still open, and its wave."""
    rollout = world.rollouts.get(question.rollout)
    if rollout is None or not rollouts.is_open(rollout):
        return None
    gate = rollout.facts.plan.gates[question.gate]
    for planned, wave in zip(rollout.facts.plan.waves, rollout.waves, strict=True):
        if planned.region == question.region and isinstance(wave, waves.Baking) and isinstance(gate, QueryGate):
            return (gate, wave) if (wave.stage, wave.since) == (question.stage, question.since) else None
    return None


async def _answer(server: Prometheus, query: str) -> dict[str, Any]:
    """Raises OSError, TimeoutError, aiohttp.ClientError, ValueError: there is none."""
    headers = {"Authorization": f"Bearer {server.token_file.read_text().strip()}"} if server.token_file else {}
    tls = ssl.create_default_context(cafile=server.ca_file) if server.ca_file is not None else True
    async with (
        asyncio.timeout(WITHIN_S),
        aiohttp.ClientSession(trust_env=False) as session,
        session.post(
            f"{server.url}/api/v1/query", data={"query": query}, headers=headers, ssl=tls, allow_redirects=False
        ) as response,
    ):
        body = await response.content.read(MOST_BYTES + 1)
        while len(body) <= MOST_BYTES and not response.content.at_eof():
            body += await response.content.read(MOST_BYTES + 1)
        if len(body) > MOST_BYTES:
            raise ValueError(f"it is larger than {MOST_BYTES} bytes")
        try:
            told = from_json(body)  # which knows no lone surrogates, and no depth without end
        except ValueError:
            raise ValueError(f"status {response.status}, and no JSON") from None
        if not isinstance(told, dict):
            raise ValueError(f"status {response.status}, and no answer of Prometheus")
        return told


def value_of(answer: dict[str, Any]) -> tuple[float | None, str]:
    """The one value of an answer, or why it has none. Pure."""
    if answer.get("status") != "success":
        return None, f"Prometheus says: {answer.get('error') or answer.get('status')}"
    try:
        kind, result = answer["data"]["resultType"], answer["data"]["result"]
        if kind == "vector":
            if not result:
                return None, "the answer is empty: no series fits the query"
            if len(result) > 1:
                return None, f"the answer has {len(result)} series; sum or max of them is one"
            value = float(result[0]["value"][1])
        elif kind == "scalar":
            value = float(result[1])
        else:
            return None, f"the answer is a {kind}, not one value"
    except (KeyError, IndexError, TypeError, ValueError, OverflowError):
        return None, "the answer cannot be read"
    return (value, "") if math.isfinite(value) else (None, f"the answer is {value}")
