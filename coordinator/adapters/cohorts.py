"""Answers what aggregators ask the coordinator: which nodes take part in a phase, and which are online.

An aggregator that was given up (its coordinator was frozen when another took over) learns here
that it must end.
"""

from __future__ import annotations

from fedtide.coordinator.log.engine import Engine
from fedtide.coordinator.runs import runs, selection
from fedtide.fabric.encoding import from_json, to_json
from fedtide.fabric.errors import NotFound
from fedtide.fabric.messages.cohort import Cohort, CohortQuestion, Member
from fedtide.fabric.nats.broker import Broker
from fedtide.fabric.nats.jetstream import Received
from fedtide.fabric.nats.subjects import Subjects


class CohortAnswers:
    """Answers aggregators that ask which nodes to use, while this coordinator leads."""

    def __init__(self, broker: Broker, subjects: Subjects, engine: Engine) -> None:
        self._broker = broker
        self._subjects = subjects
        self._engine = engine

    async def listen(self) -> None:
        await self._broker.subscribe(self._subjects.rpc("cohort"), self._cohort)

    async def _cohort(self, message: Received) -> None:
        question = from_json(CohortQuestion, message.data, "question")
        await self._broker.respond(message, to_json(self._answer(question)))

    def _answer(self, question: CohortQuestion) -> Cohort:
        world = self._engine.world
        try:
            run = world.run(question.run)
        except NotFound:
            return Cohort(superseded=True)
        if not runs.is_current(run, question.attempt):
            return Cohort(superseded=True)
        asking = selection.Asking(question.run, question.round, question.trial, question.phase)
        nodes = world.nodes.values()
        chosen = selection.choose(nodes, run.facts.spec, asking, world.tasks_of_others(question.run), world.last_asked)
        return Cohort(
            nodes=[Member(name=n.name, region=n.region, codecs=n.capabilities.codecs) for n in chosen],
            online=[n.name for n in nodes if n.online],
        )
