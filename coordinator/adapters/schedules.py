"""Trigger rules that fire by the clock: cron in a time zone, without polling.

A time fires once: the signal's id is the rule and the time. Times that pass while no coordinator
runs are not made up for.
"""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from cronsim import CronSim, CronSimError

from fedtide.coordinator.log.engine import Engine
from fedtide.fabric.errors import ConfigError
from fedtide.fabric.events.envelope import SignalReceived
from fedtide.fabric.plans.trigger_rule import Schedule, Signal


def next_after(schedule: Schedule, moment: datetime) -> datetime:
    """The next time of a schedule after `moment`, in UTC.

    Raises:
        ConfigError: a cron expression or time zone that does not exist.
    """
    try:
        local = moment.astimezone(ZoneInfo(schedule.timezone))
        following: datetime = next(CronSim(schedule.cron, local))
    except CronSimError as exc:
        raise ConfigError("schedule.cron", f"{schedule.cron!r}: {exc}", "For example: 0 2 * * *") from exc
    except (ZoneInfoNotFoundError, ValueError) as exc:
        raise ConfigError("schedule.timezone", f"there is no time zone {schedule.timezone!r}") from exc
    return following.astimezone(UTC)


async def keep(engine: Engine) -> None:
    """Fire every rule's schedule at its times, for ever; rules may change meanwhile."""
    since = datetime.now(UTC)
    with engine.watch() as changed:
        while True:
            rules = [t.rule for t in engine.world.triggers.values()]
            due = {r.name: (next_after(r.schedule, since), r.type) for r in rules if r.schedule is not None}
            earliest = min((at for at, _ in due.values()), default=None)
            try:
                seconds = None if earliest is None else max(0.0, (earliest - datetime.now(UTC)).total_seconds())
                async with asyncio.timeout(seconds):
                    await changed()
                # A new rule does not fire for past times; a time that is due now is not skipped.
                now = datetime.now(UTC)
                since = now if earliest is None or now < earliest else since
                continue
            except TimeoutError:
                for name, (at, type_) in due.items():
                    if at == earliest:
                        signal = Signal(id=f"schedule.{name}.{at.isoformat()}", type=type_)
                        await engine.submit(SignalReceived(signal=signal), id=signal.id)
                since = earliest or since
