"""Keeps training within the node's limits: it is paused while one is exceeded or inference is too slow.

Memory is capped by the kernel, everything else here: a training process that must wait is stopped
(SIGSTOP) with all it started, and goes on where it was. Looks only while there is something to train.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime

from fedtide.edge_agent.config import TrainingLimits
from fedtide.edge_agent.serving.serving import Served
from fedtide.edge_agent.tasks import sensors
from fedtide.fabric.errors import RemoteError
from fedtide.fabric.plans.windows import is_open

log = logging.getLogger(__name__)

SLICE_S = 0.1
"""Period of the CPU share, in seconds."""
RESUME_RATIO = 0.8
"""Training resumes once the latency is below this share of its objective (hysteresis)."""
LATENCY_EXPIRY_S = 2.0
"""After so many seconds without requests the latency counts as 0."""


class LimitExceeded(RemoteError):
    """A task was ended because it would break the node's limits."""


class Latency:
    """An observer of the serving: the mean latency of the latest requests, in milliseconds."""

    def __init__(self) -> None:
        self._mean_ms = 0.0
        self._last = float("-inf")

    def observe(self, served: Served) -> None:
        self._mean_ms += 0.1 * (served.seconds * 1000 - self._mean_ms)
        self._last = time.monotonic()

    @property
    def mean_ms(self) -> float:
        """0 while there are no requests."""
        return self._mean_ms if time.monotonic() - self._last < LATENCY_EXPIRY_S else 0.0


class Governor:
    """`show` is called with the reason of a pause, and when training resumes."""

    def __init__(
        self,
        limits: TrainingLimits,
        timezone: str,
        latency: Latency,
        show: Callable[[str], None],
        owner: Callable[[], str] = str,
    ) -> None:
        """`owner`: why this node's owner lets nothing train now; empty: training may go on."""
        self._owner = owner
        self._limits = limits
        self._timezone = timezone
        self._latency = latency
        self._show = show
        self._waits = ""

    async def until_allowed(self) -> None:
        """Wait until training may begin."""
        while reason := await self._reason():
            self._say(reason)
            await asyncio.sleep(self._limits.check_s)  # sensors must be polled
        self._waits = ""

    async def watch(self, group: int) -> None:
        """Pause and resume a process group until cancelled; then it is left running.

        Raises:
            LimitExceeded: it has trained for as long as a task may.
        """
        share = self._limits.cpu_share
        trained, seen, used = 0.0, time.monotonic(), sensors.cpu_seconds(group) if share < 1 else 0.0
        next_look, budget, paused = 0.0, 0.0, False
        cores = os.cpu_count() or 1
        try:
            while True:
                now = time.monotonic()
                trained += 0.0 if paused else now - seen
                if self._limits.task_s is not None and trained > self._limits.task_s:
                    raise LimitExceeded(f"trained for {self._limits.task_s:g} s, which is as long as a task may")
                spent = sensors.cpu_seconds(group) if share < 1 else used
                budget = min(SLICE_S * share * cores, budget + (now - seen) * share * cores - (spent - used))
                seen, used = now, spent
                if now >= next_look:
                    next_look = now + self._look_s
                    self._say(await self._reason())
                wants_pause = bool(self._waits) or budget < 0
                if wants_pause is not paused:
                    paused = wants_pause
                    _signal(group, signal.SIGSTOP if paused else signal.SIGCONT)
                await asyncio.sleep(SLICE_S if share < 1 else self._look_s)
        finally:
            if paused:
                _signal(group, signal.SIGCONT)
            self._waits = ""

    @property
    def _look_s(self) -> float:
        slo = self._limits.inference_slo_ms is not None
        task = self._limits.task_s is not None
        return min(self._limits.check_s, SLICE_S if slo else 1.0 if task else self._limits.check_s)

    def _say(self, reason: str) -> None:
        if reason != self._waits:
            self._waits = reason
            log.info("training.waits" if reason else "training.goes_on", extra={"reason": reason})
            self._show(f"paused: {reason}" if reason else "training")

    async def _reason(self) -> str:
        """Why training must pause now; empty if it may run."""
        limits = self._limits
        if reason := self._owner():
            return reason
        if limits.window is not None and not is_open(limits.window, datetime.now(UTC), self._timezone):
            return f"outside its window {limits.window.start:%H:%M} to {limits.window.end:%H:%M}"
        if limits.inference_slo_ms is not None:
            edge = limits.inference_slo_ms * (RESUME_RATIO if self._waits.startswith("requests") else 1.0)
            if self._latency.mean_ms > edge:
                return f"requests take more than {limits.inference_slo_ms:g} ms"
        celsius = sensors.hottest_celsius() if limits.max_celsius is not None else None
        if celsius is not None and limits.max_celsius is not None and celsius > limits.max_celsius:
            return f"the machine is above {limits.max_celsius:g} degrees"
        battery = sensors.battery() if limits.min_battery is not None else None
        if battery is not None and not battery.charging and battery.charge < (limits.min_battery or 0.0):
            return f"the battery is below {limits.min_battery:.0%}"
        if limits.allow_command and not await _succeeds(limits.allow_command):
            return f"{limits.allow_command[0]} says no"
        return ""


async def _succeeds(command: list[str]) -> bool:
    """Whether a command exits with 0; False if it cannot be started or hangs."""
    try:
        process = await asyncio.create_subprocess_exec(
            *command, stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.DEVNULL
        )
    except OSError as exc:
        log.warning("limits.command_failed", extra={"command": command[0], "reason": str(exc)})
        return False
    try:
        async with asyncio.timeout(10):
            return await process.wait() == 0
    except TimeoutError:
        process.kill()
        await process.wait()
        return False


def _signal(group: int, number: signal.Signals) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(group, number)
