"""Client of a fold worker: requests may take long; a worker that dies meanwhile is detected."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from fedtide.fabric.encoding import from_json, to_json
from fedtide.fabric.errors import MalformedMessage, TransientError
from fedtide.fabric.messages.fold import FoldAnswer, FoldEntry, FoldPlan, FoldRequest
from fedtide.fabric.nats.broker import Broker

_PING_S = 2.0
_LOOK_S = 2.0
_FOLD_S = 600.0
_AT_ONCE = 16


Sign = Callable[[str, bytes], dict[str, str]]
"""From a subject and a body to the headers of its signature."""


def unsigned(_: str, __: bytes) -> dict[str, str]:
    """Among the processes of one aggregator."""
    return {}


async def instance_of(broker: Broker, subject: str) -> str:
    """The instance id of the worker that answers on a subject.

    Raises:
        TransientError: no worker answers.
    """
    raw = await broker.ask(subject, to_json(FoldRequest()), timeout_s=_PING_S)
    return _understood(raw, subject).instance


async def ask(broker: Broker, subject: str, request: FoldRequest, who: str, sign: Sign = unsigned) -> FoldAnswer:
    """Send a request and return the answer; the worker is pinged while it works.

    Args:
        sign: the headers by which a worker of somebody else knows who asks.

    Raises:
        TransientError: the worker does not answer, restarted meanwhile, or reports a failure.
    """
    first = await instance_of(broker, subject)
    data = to_json(request)
    asking = asyncio.create_task(broker.ask_with_headers(subject, data, sign(subject, data), timeout_s=_FOLD_S))
    try:
        while not (await asyncio.wait({asking}, timeout=_LOOK_S))[0]:
            if await instance_of(broker, subject) != first:
                raise TransientError(f"{who} was started again while it worked")
        return _understood(asking.result().data, who)
    finally:
        if not asking.done():
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)


def in_steps(plan: FoldPlan, entries: Sequence[FoldEntry]) -> list[FoldRequest]:
    """Requests that make a worker hold these entries; a restarted worker folds all of them again."""
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
