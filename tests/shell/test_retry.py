"""The one way to wait for what may work later."""

from __future__ import annotations

import asyncio
import logging

import pytest

from fedtide.fabric.errors import BrokerUnavailable, MalformedMessage
from fedtide.fabric.process.retry import CAP_S, JITTER_S, Backoff, until_done

pytestmark = pytest.mark.looptime
LOG = logging.getLogger(__name__)


class Flaky:
    """Fails so often before it works."""

    def __init__(self, failures: int, error: Exception | None = None) -> None:
        self.left = failures
        self.error = error or BrokerUnavailable("away")
        self.asked_at: list[float] = []

    async def __call__(self) -> str:
        self.asked_at.append(asyncio.get_running_loop().time())
        if self.left:
            self.left -= 1
            raise self.error
        return "done"

    def pauses(self) -> list[float]:
        return [b - a for a, b in zip(self.asked_at, self.asked_at[1:], strict=False)]


async def test_it_goes_on_until_it_works_with_pauses_that_grow_to_the_cap() -> None:
    work = Flaky(50)
    assert await until_done(LOG, "test.waits", work) == "done"
    pauses = work.pauses()
    assert pauses[0] <= 1 and all(pause <= CAP_S + JITTER_S for pause in pauses)
    assert pauses[-1] > CAP_S - JITTER_S


async def test_what_waiting_does_not_mend_is_raised_at_once() -> None:
    work = Flaky(1, MalformedMessage("never"))
    with pytest.raises(MalformedMessage):
        await until_done(LOG, "test.waits", work)
    assert len(work.asked_at) == 1


async def test_the_last_error_is_raised_when_the_time_is_over() -> None:
    with pytest.raises(BrokerUnavailable, match="away"):
        await until_done(LOG, "test.waits", Flaky(10**9), give_up_after_s=0.01)


async def test_a_wait_is_logged_once_for_each_reason(caplog: pytest.LogCaptureFixture) -> None:
    errors = [BrokerUnavailable("away"), BrokerUnavailable("away"), BrokerUnavailable("full")]

    async def work() -> None:
        if errors:
            raise errors.pop(0)

    with caplog.at_level(logging.INFO):
        await until_done(LOG, "test.waits", work, node="n1")
    waits = [r for r in caplog.records if r.message == "test.waits"]
    assert [(vars(r)["node"], vars(r)["reason"]) for r in waits] == [("n1", "away"), ("n1", "full")]


async def test_a_backoff_starts_small_again_after_success() -> None:
    loop, backoff = asyncio.get_running_loop(), Backoff()
    for _ in range(20):
        await backoff.wait()
    backoff.reset()
    began = loop.time()
    await backoff.wait()
    assert loop.time() - began < 1
