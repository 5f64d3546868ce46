"""Asking a fold worker: it may take its time, but not die unnoticed."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from fedtide.fabric.encoding import from_json, to_json
from fedtide.fabric.errors import MalformedMessage, TransientError
from fedtide.fabric.messages.fold import FoldAnswer, FoldEntry, FoldPlan, FoldRequest
from fedtide.fabric.nats.broker import Broker

_PING_S = 2.0
_LOOK_S = 2.0
_FOLD_S = 600.0
_AT_ONCE = 16


async def instance_of(broker: Broker, subject: str) -> str:
    """Which process answers on a subject.

    Raises:
        TransientError: none.
    """
    raw = await broker.ask(subject, to_json(FoldRequest()), timeout_s=_PING_S)
    return _understood(raw, subject).instance


async def ask(broker: Broker, subject: str, request: FoldRequest, who: str) -> FoldAnswer:
    """The answer of a worker that is looked at again and again while it works.

    Raises:
        TransientError: it is not there, froze, was started again in between, or says that it failed.
    """
    first = await instance_of(broker, subject)
    data = to_json(request)
    asking = asyncio.create_task(broker.ask(subject, data, timeout_s=_FOLD_S))
    try:
        while not (await asyncio.wait({asking}, timeout=_LOOK_S))[0]:
            if await instance_of(broker, subject) != first:
                raise TransientError(f"{who} was started again while it worked")
        return _understood(asking.result(), who)
    finally:
        if not asking.done():
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)


def in_steps(plan: FoldPlan, entries: Sequence[FoldEntry]) -> list[FoldRequest]:
    """Requests that bring a worker up to these entries: one that was restarted folds all of them anew."""
    return [
        FoldRequest(plan=plan, entries=list(entries[first : first + _AT_ONCE]))
        for first in range(0, len(entries), _AT_ONCE)
    ]


def _understood(raw: bytes, who: str) -> FoldAnswer:
    try:
        answer = from_json(FoldAnswer, raw, "answer")
    except MalformedMessage as exc:
        raise TransientError(f"{who}: {exc.what}") from exc
    if answer.error:
        raise TransientError(f"{who}: {answer.error}")
    return answer
