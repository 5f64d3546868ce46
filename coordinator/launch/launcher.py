"""What starts aggregators: the interface, and what its implementations share."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

from fedtide.coordinator.commands import LaunchAggregator
from fedtide.coordinator.config import CoordinatorConfig
from fedtide.fabric.nats.credentials import Credentials

GONE = -1
"""Exit code of a process whose real one is unknown, because it was not our child."""


@dataclass(frozen=True, slots=True)
class Exit:
    """How an aggregator ended. `preempted`, `hopeless`, `out_of_memory`: as of the event `AggregatorExited`.

    `cpu_us`: the CPU time that it has used in all, if that is known.
    """

    run: str
    attempt: int
    code: int
    reason: str = ""
    preempted: bool = False
    hopeless: bool = False
    out_of_memory: bool = False
    cpu_us: int = 0


Exited = Callable[[Exit], Coroutine[Any, Any, None]]
"""Told that an aggregator is gone."""


class Reports(Protocol):
    """Told what becomes of aggregators."""

    async def exited(self, how: Exit) -> None: ...
    async def waits(self, run: str, attempt: int, reason: str) -> None: ...


CredentialsOf = Callable[[str, int], Credentials | None]
"""The broker credentials of the aggregator of a run, in one of its lives; None where the broker asks for none."""


class Launcher(Protocol):
    """Runs aggregators somewhere.

    An attempt is started at most once: `launch` adopts one that still runs, and reports the exit
    of one that was started before and is gone (its task ids must not be used again). `helpers`: the processes here that
    it needs for that.
    """

    def prepare(self) -> None: ...
    def helpers(self) -> Iterable[int]: ...
    async def launch(self, command: LaunchAggregator, wanted: Callable[[], bool]) -> None: ...
    async def stop(self, run: str) -> None: ...
    async def close(self) -> None: ...


def worker_config(command: LaunchAggregator, config: CoordinatorConfig, work_dir: str) -> dict[str, Any]:
    """The configuration of an aggregator process, without its credentials."""
    return {
        "run": command.run,
        "attempt": command.attempt,
        "life": command.life,
        "spec": command.spec.model_dump(mode="json"),
        "nats_url": config.nats_url,
        "ca_file": str(config.ca_file) if config.ca_file is not None else None,
        "tenant": config.tenant,
        "work_dir": work_dir,
        "regions": config.regions,
        "packages": config.packages.model_dump(mode="json"),
        "trace": command.trace if config.traces.endpoint else "",
    }
