"""Commands: in order for each subject, again until done, parked when they cannot be done."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest

from fedtide.coordinator.commands import AnnouncePresence, CacheRelease, CleanUp, Command, PublishRelease, TellTimeIsUp
from fedtide.coordinator.executor import AT_ONCE, Executor
from fedtide.fabric.errors import BrokerUnavailable, InvalidTransition, NotFound, ReducerFailed
from tests.scenarios.build import produced, ref

pytestmark = pytest.mark.looptime


@asynccontextmanager
async def executing(handle: Callable[[Command], Awaitable[None]]) -> AsyncIterator[Executor]:
    async with asyncio.TaskGroup() as group:
        yield Executor(handle, group)


def alarm(run: str, number: int) -> TellTimeIsUp:
    return TellTimeIsUp(run, number, 1, "train", "deadline")


async def test_commands_of_one_subject_are_done_in_their_order_and_others_meanwhile() -> None:
    done: list[Command] = []

    async def slowly(command: Command) -> None:
        await asyncio.sleep(10 if command == alarm("a", 1) else 1)
        done.append(command)

    async with executing(slowly) as executor:
        executor.start("evt-1", (alarm("a", 1), alarm("a", 2), CleanUp("b")))
        executor.start("evt-2", (alarm("a", 3),))
    assert done == [CleanUp("b"), alarm("a", 1), alarm("a", 2), alarm("a", 3)]


@pytest.mark.parametrize("error", [BrokerUnavailable("away"), OSError(28, "No space left on device")])
async def test_what_may_be_done_later_is_tried_again_and_lets_others_go_on(error: Exception) -> None:
    failures = 20
    done: list[Command] = []

    async def at_last(command: Command) -> None:
        nonlocal failures
        if command == CleanUp("a") and failures:
            failures -= 1
            raise error
        done.append(command)

    async with executing(at_last) as executor:
        executor.start("evt-1", (CleanUp("a"), alarm("a", 1), CleanUp("b")))
    assert done == [CleanUp("b"), CleanUp("a"), alarm("a", 1)] and not executor.parked


async def test_what_meets_an_error_of_ours_is_parked_and_what_is_outdated_is_not() -> None:
    async def fails(command: Command) -> None:
        if command == CleanUp("a"):
            raise ReducerFailed("event x cannot be applied: KeyError")
        raise InvalidTransition("the run has ended")

    async with executing(fails) as executor:
        executor.start("evt-1", (CleanUp("a"), CleanUp("b")))
    assert [order.command for order in executor.parked.values()] == [CleanUp("a")]


async def test_a_command_that_waits_for_its_next_try_holds_no_place() -> None:
    stuck = [CleanUp(f"r{i}") for i in range(AT_ONCE["control"])]
    away = True
    done = asyncio.Event()

    async def handle(command: Command) -> None:
        if isinstance(command, CleanUp) and away:
            raise BrokerUnavailable("away")
        if isinstance(command, TellTimeIsUp):
            done.set()

    async with executing(handle) as executor:
        executor.start("evt-1", tuple(stuck))
        await asyncio.sleep(1)
        executor.start("evt-2", (alarm("other", 1),))
        async with asyncio.timeout(10):
            await done.wait()
        away = False


async def test_what_cannot_be_done_is_parked_with_its_reason_and_can_be_tried_again() -> None:
    broken = True
    done: list[Command] = []

    async def handle(command: Command) -> None:
        if broken and isinstance(command, CleanUp):
            raise ZeroDivisionError("whatever")
        done.append(command)

    async with executing(handle) as executor:
        executor.start("evt-7", (CleanUp("a"), alarm("a", 1)))
        await asyncio.sleep(1)
        (parked,) = executor.parked_about("a")
        assert (parked.cause, parked.name, parked.reason) == ("evt-7", "CleanUp", "ZeroDivisionError: whatever")
        broken = False
        executor.retry(parked.id)
        with pytest.raises(NotFound):
            executor.retry(parked.id)
    assert done == [alarm("a", 1), CleanUp("a")] and not executor.parked


async def test_an_outdated_command_is_dropped() -> None:
    async def handle(command: Command) -> None:
        raise InvalidTransition("the run has ended")

    async with executing(handle) as executor:
        executor.start("evt-1", (AnnouncePresence("n", "online"),))
    assert not executor.parked


async def test_a_region_that_is_away_holds_up_neither_other_regions_nor_releases() -> None:
    done: list[Command] = []

    async def handle(command: Command) -> None:
        if isinstance(command, CacheRelease) and command.region == "away":
            await asyncio.sleep(10_000)
        done.append(command)

    slow = tuple(CacheRelease(f"ro-{i}", "away", 1, ref("e"), None) for i in range(20))
    others = (CacheRelease("ro-1", "there", 1, ref("e"), None), PublishRelease(produced(), 1))
    async with executing(handle) as executor:
        executor.start("evt-1", (*slow, *others))
        await asyncio.sleep(1)
        assert done == list(others)
