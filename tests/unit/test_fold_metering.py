"""What a regional aggregator has used is the request's that it was for, whoever looks whether it lives meanwhile."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace

from fedtide.aggregation.folding.fold_worker import FoldWorker, FoldWorkerConfig
from fedtide.fabric.encoding import from_json, to_json
from fedtide.fabric.messages.fold import FoldAnswer, FoldPlan, FoldRequest
from fedtide.fabric.messages.usage import Usage

PLAN = FoldPlan(key="k", run="r", specs=[], points=[], max_terms=1)


class Meter:
    """Counts a microsecond for each call."""

    def __init__(self) -> None:
        self.left = 0

    def leave(self) -> None:
        self.left += 1

    def take(self) -> Usage:
        return Usage(cpu_us=1)


async def test_a_ping_takes_nothing_of_a_fold_that_is_under_way(tmp_path: Path) -> None:
    answers: list[FoldAnswer] = []

    async def respond(_: object, data: bytes) -> None:
        answers.append(from_json(FoldAnswer, data, "answer"))

    meter, goes_on = Meter(), asyncio.Event()
    config = FoldWorkerConfig(name="eu", region="eu", nats_url="nats://127.0.0.1:1")
    worker = FoldWorker(config, SimpleNamespace(respond=respond), meter)

    async def slowly(*_: object) -> FoldAnswer:
        await goes_on.wait()
        return FoldAnswer()

    worker._answer = slowly
    folding = asyncio.create_task(worker._respond(SimpleNamespace(data=to_json(FoldRequest(plan=PLAN)))))
    await asyncio.sleep(0)
    await worker._respond(SimpleNamespace(data=to_json(FoldRequest())))
    goes_on.set()
    await folding
    assert [answer.usage for answer in answers] == [Usage(), Usage(cpu_us=1)]
    assert meter.left == 1, "what was before the fold; nothing of it"
