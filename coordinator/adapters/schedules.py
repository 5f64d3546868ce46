"""Trigger rules that fire by the clock: cron in a time zone, or the best hour of a window; without polling.

A time fires once: the signal's id is the rule and the time. Of times that passed while no coordinator led, or while the
broker was away, each rule makes up for the last one, if it is not longer ago than `MAKE_UP_S`.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from cronsim import CronSim, CronSimError

from fedtide.coordinator.fleet import fleet, forecast
from fedtide.coordinator.log.engine import Engine
from fedtide.coordinator.state import World
from fedtide.fabric.errors import ConfigError, InvalidTransition
from fedtide.fabric.events.envelope import SignalReceived
from fedtide.fabric.plans.trigger_rule import Schedule, Signal, TriggerRule
from fedtide.fabric.plans.windows import Window, is_open, openings

log = logging.getLogger(__name__)

MAKE_UP_S = 600.0
"""A time that passed longer ago, unnoticed, is not made up for."""
FORGOTTEN_AFTER = timedelta(days=3)
UNSURE_S = 5.0
"""So long before its last event a leader that is gone may have missed a time: what it has fired does not fire again."""


Pick = Callable[[datetime, datetime], datetime]
"""The best time of a window."""


def _earliest(begin: datetime, end: datetime) -> datetime:
    return begin


def next_after(schedule: Schedule, moment: datetime, pick: Pick = _earliest) -> datetime:
    """The next time of a schedule after `moment`, in UTC.

    Args:
        pick: which time of a window is taken, if the schedule has one.

    As Debian's cron where clocks change: a fixed time that is skipped comes right after the gap, one that happens twice
    comes once, and what comes every so many minutes goes on.

    Raises:
        ConfigError: a cron expression or time zone that does not exist.
    """
    try:
        local = moment.astimezone(ZoneInfo(schedule.timezone))
        if (window := schedule.window) is not None:
            return _next_in(window, schedule.timezone, moment, pick)
        times: Iterator[datetime] = iter(CronSim(schedule.cron, local))
        # Between the two occurrences of a time the iterator begins with the first one, which is over.
        return next(utc for at in times if (utc := at.astimezone(UTC)) > moment)
    except CronSimError as exc:
        raise ConfigError("schedule.cron", f"{schedule.cron!r}: {exc}", "For example: 0 2 * * *") from exc
    except (ZoneInfoNotFoundError, ValueError, OSError) as exc:
        raise ConfigError("schedule.timezone", f"there is no time zone {schedule.timezone!r}") from exc


def _next_in(window: Window, timezone: str, moment: datetime, pick: Pick) -> datetime:
    minute = timedelta(minutes=1)  # of a window that falls into the hour that clocks leave out
    picked = (pick(begin, max(end, begin + minute)) for begin, end in openings(window, moment, timezone))
    return next(at for at in picked if at > moment)


Chosen = dict[tuple[str, datetime], datetime]
"""By rule and beginning of a window: the time that was chosen when it had begun."""


def best_for(rule: TriggerRule, world: World, chosen: Chosen, now: datetime) -> Pick:
    """By what is known of the regions of the nodes that a rule would ask.

    Once a window has begun, its time stays: what is seen meanwhile would make the hour that passes look best.
    """
    if rule.schedule is None or rule.schedule.window is None:
        return _earliest
    selector = getattr(rule.do, "selector", {})
    nodes = Counter(node.region for node in world.members() if fleet.matches(node, selector))

    def pick(begin: datetime, end: datetime) -> datetime:
        if begin > now:
            return forecast.best_time(begin, end, world.free, nodes)[0]
        key = rule.name, begin
        if key not in chosen:
            chosen[key] = forecast.best_time(max(begin, min(now, end)), end, world.free, nodes)[0]
        return chosen[key]

    return pick


async def keep(engine: Engine) -> None:
    """Fire every rule's schedule at its times, for ever; rules may change meanwhile."""
    now = datetime.now(UTC)
    last = (engine.last_before_take_over or now) - timedelta(seconds=UNSURE_S)
    since = max(last, now - timedelta(seconds=MAKE_UP_S))
    chosen: Chosen = {}
    with engine.watch() as changed:
        while True:
            for key in [key for key in chosen if key[1] < datetime.now(UTC) - FORGOTTEN_AFTER]:
                del chosen[key]
            rules = [t.rule for t in engine.world.triggers.values()]
            due = [
                (rule, at)
                for rule in rules
                if (at := _next(rule, since, best_for(rule, engine.world, chosen, datetime.now(UTC)))) is not None
            ]
            earliest = min((at for _, at in due), default=None)
            try:
                seconds = None if earliest is None else max(0.0, (earliest - datetime.now(UTC)).total_seconds())
                async with asyncio.timeout(seconds):
                    await changed()
                # A new rule does not fire for past times; a time that is due now is not skipped.
                now = datetime.now(UTC)
                since = now if earliest is None or now < earliest else since
                continue
            except TimeoutError:
                since = now = datetime.now(UTC)
                for rule, first in due:
                    if (at := due_until(rule, first, now, best_for(rule, engine.world, chosen, now))) is not None:
                        await _fire(engine, rule, at)


def _next(rule: TriggerRule, since: datetime, pick: Pick) -> datetime | None:
    """The rule's next time; None if it has no schedule, or one that this machine does not understand."""
    if rule.schedule is None:
        return None
    try:
        return next_after(rule.schedule, since, pick)
    except ConfigError as exc:
        log.warning("schedule.not_understood", extra={"rule": rule.name, "reason": str(exc)})
        return None


def due_until(rule: TriggerRule, first: datetime, now: datetime, pick: Pick = _earliest) -> datetime | None:
    """Of the rule's times that have come, from `first` on, the last one that is not too long ago."""
    found, at = None, first
    while at <= now:
        found = at
        following = _next(rule, at, pick)
        if following is None:
            break
        at = following
    if found is None or found >= now - timedelta(seconds=MAKE_UP_S):
        return found
    window = rule.schedule.window if rule.schedule is not None else None
    still_open = window is not None and rule.schedule is not None and is_open(window, now, rule.schedule.timezone)
    return found if still_open else None


def which(rule: TriggerRule, at: datetime) -> str:
    """A window fires once, also if another of its hours looks better afterwards."""
    assert rule.schedule is not None
    window = rule.schedule.window
    if window is None:
        return at.isoformat()
    return max(begin for begin, _ in openings(window, at, rule.schedule.timezone) if begin <= at).isoformat()


async def _fire(engine: Engine, rule: TriggerRule, at: datetime) -> None:
    signal = Signal(id=f"schedule.{rule.name}.{which(rule, at)}", type=rule.type)
    try:
        await engine.submit(SignalReceived(signal=signal), id=signal.id)
    except InvalidTransition as exc:
        log.warning("schedule.not_fired", extra={"rule": rule.name, "reason": str(exc)})
