"""What each event does to the ledger and to budgets, and what rules hear of it. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from decimal import Decimal
from typing import Any

from immutables import Map

from fedtide.coordinator.ledger import anomalies, booking, budgets, valuation
from fedtide.coordinator.ledger.accounts import NOBODY, Account, Entry, by_days
from fedtide.coordinator.ledger.valuation import Valued, Valuer
from fedtide.coordinator.runs import runs
from fedtide.coordinator.signals import signal
from fedtide.coordinator.state import World
from fedtide.fabric.errors import NotFound
from fedtide.fabric.events.costs import BudgetApplied, BudgetRemoved, PricesApplied, UsageReported
from fedtide.fabric.events.envelope import Event, ReleasePublished
from fedtide.fabric.events.runs import RoundAbandoned, RoundClosed, RoundOpened, RunPauseRequested
from fedtide.fabric.plans.prices import Budget
from fedtide.fabric.plans.trigger_rule import FieldValue, Signal

KEPT_BY_HOUR_DAYS = 40
"""Older lines of what was used for nobody are summed up by day."""


@dataclass(frozen=True, slots=True)
class Booked:
    """What follows from the ledger: what rules may act upon, and budgets that are used up since this event."""

    signals: list[Signal]
    used_up: list[Budget]


def book(world: World, event: Event, *, is_news: bool) -> Booked:
    """Take an event into the ledger and the budgets.

    Args:
        is_news: whether it has changed what it is about.
    """
    name = booking.subject(event)
    if isinstance(event.data, ReleasePublished) and name not in world.runs:
        name = NOBODY  # one that was made elsewhere
    entry = Entry(_account(world, name))
    if not (isinstance(event.data, ReleasePublished) and name == NOBODY):
        booking.book(entry, event, _where(world, name, is_news))
    lines = [Valued(name, entry.account.tags, line, n, world.valuer.cost(line, n)) for line, n in entry.lines]
    if entry.account is not world.ledger.get(name):
        world.ledger[name] = entry.account
    if isinstance(event.data, UsageReported):
        world.metered = event.id
    _sum_up(world, lines)
    before = dict(world.budgets)
    signals = [*_of_budgets(world, event, name, entry.account, lines), *_of_hours(world, event, lines)]
    used_up = [
        kept.budget
        for key, kept in world.budgets.items()
        if _is_used_up(kept) and not (key in before and _is_used_up(before[key]))
    ]
    return Booked(signals, used_up)


def _is_used_up(kept: budgets.Kept) -> bool:
    return kept.budget.when_spent == "hold" and kept.spent >= kept.budget.amount


def ended(world: World, key: str, outcome: str) -> None:
    """A run or roll-out is over; `outcome`: why what it used was of no use, empty if it was."""
    if key in world.ledger:
        entry = Entry(world.ledger[key])
        entry.tag(ended=outcome)
        entry.set(answers=Map())
        world.ledger[key] = entry.account
    let_go(world, key)


def let_go(world: World, key: str) -> None:
    """What was set aside for a run is free again."""
    for budget, kept in world.budgets.items():
        if key in kept.reserved:
            world.budgets[budget] = budgets.release(kept, key)


def prices_applied(world: World, data: PricesApplied, at: datetime) -> None:
    """What was used before is valued anew, and so are the budgets."""
    world.valuer = Valuer(data.book)
    for name, kept in world.budgets.items():
        world.budgets[name] = _begun(world, kept, at)
    world.hourly.clear()
    _sum_up(world, valuation.valued(world.ledger, world.valuer))


def budget_applied(world: World, data: BudgetApplied, at: datetime) -> None:
    before = world.budgets.get(data.budget.name)
    start, _ = budgets.period_of(data.budget, at)
    kept = budgets.Kept(data.budget, start) if before is None else replace(before, budget=data.budget)
    world.budgets[data.budget.name] = _begun(world, kept, at)


QUOTA = "quota"
"""The name of the budget that a tenant's quota is; a tenant does not change it."""


def quota_set(world: World, money: Decimal | None, at: datetime) -> None:
    """Let a tenant spend so much in a month; None: as much as it likes."""
    if money is None:
        world.budgets.pop(QUOTA, None)
    else:
        budget_applied(
            world, BudgetApplied(budget=Budget(name=QUOTA, amount=money, period="month", when_spent="hold")), at
        )


def budget_removed(world: World, data: BudgetRemoved) -> None:
    world.budgets.pop(data.name, None)


def _begun(world: World, before: budgets.Kept, at: datetime) -> budgets.Kept:
    return budgets.begun(before.budget, at, valuation.valued(world.ledger, world.valuer), before)


Grants = Mapping[str, Mapping[str, Decimal]]
"""By budget and run: what is set aside for rounds that may begin and are not open yet."""


def held(world: World, key: str, number: int, at: datetime, granted: Grants) -> str | None:
    """Why a round of a run is held, or None."""
    for kept in _within(world, key, at, "hold"):
        others = {run: cost for run, cost in granted.get(kept.budget.name, {}).items() if run != key}
        if (reason := budgets.why_not(kept, key, number, others)) is not None:
            return reason
    return None


def grants(world: World, key: str, at: datetime) -> dict[str, Decimal]:
    """By budget: what is set aside for the next round of a run."""
    return {kept.budget.name: budgets.expected(kept, key) for kept in _within(world, key, at, "hold")}


def share_of_nodes(world: World, key: str, at: datetime) -> float:
    """Which share of its nodes a round of a run may ask."""
    spent = [k.budget for k in _within(world, key, at, "throttle") if k.spent >= k.budget.amount]
    return min((budget.throttle_to for budget in spent), default=1.0)


def is_within(world: World, key: str, budget: Budget) -> bool:
    """Whether a run or roll-out is within a budget's scope."""
    return budgets.is_for(budget, _account(world, key).tags)


def why_no_waves(world: World, key: str, used_up: Iterable[Budget]) -> str | None:
    """Which of these budgets keeps a roll-out from beginning new waves, or None."""
    names = [budget.name for budget in used_up if is_within(world, key, budget)]
    return f"the budget {names[0]} is spent" if names else None


def used_up(world: World) -> list[Budget]:
    """All budgets that hold what is within them."""
    return [kept.budget for kept in world.budgets.values() if _is_used_up(kept)]


def _within(world: World, key: str, at: datetime, when_spent: str) -> Iterator[budgets.Kept]:
    tags = _account(world, key).tags
    for kept in world.budgets.values():
        if kept.budget.when_spent == when_spent and budgets.is_for(kept.budget, tags):
            yield budgets.in_period(kept, at)


def _account(world: World, name: str) -> Account:
    if (account := world.ledger.get(name)) is not None:
        return account
    run = world.runs.get(name)  # one that was requested before there was a ledger
    return Account(booking.tags_of_run(name, run.facts.spec, run.facts.by)) if run is not None else Account()


def _where(world: World, name: str, is_news: bool) -> booking.Where:
    def node(key: str) -> booking.NodeFacts | None:
        found = world.nodes.get(key)
        if found is None:
            return None
        can = found.capabilities
        return booking.NodeFacts(found.region, booking.pool_of(can.labels, can.hardware), can.cpus, can.memory_bytes)

    def release_bytes(rollout: str) -> int:
        try:
            plan = world.rollout(rollout).facts.plan
            releases = world.model(plan.model).releases
        except NotFound:
            return 0
        return next((r.manifest.onnx.size_bytes for r in releases if r.ref == plan.release), 0)

    run = world.runs.get(name)

    def asked_at(number: int, phase: str) -> datetime | None:
        if run is None:
            return None
        state = run.rounds.get(number)
        tally = state.phases.get(phase) if state is not None else None
        return tally.opened_at if tally is not None and tally.opened_at is not None else run.facts.requested_at

    is_working = isinstance(run, runs.Running)
    return booking.Where(node, release_bytes, asked_at, is_news, works=is_working, is_region=world.has_region)


def _of_budgets(world: World, event: Event, name: str, account: Account, lines: list[Valued]) -> Iterator[Signal]:
    for key, before in world.budgets.items():
        kept = budgets.spend(budgets.in_period(before, event.time), lines)
        if budgets.is_for(kept.budget, account.tags):
            kept = _set_aside(world, event.data, name, kept)
        for kind, share, amount in budgets.reached(kept, event.time):
            kept = replace(kept, told=(*kept.told, f"{kind} {share}"))
            told: dict[str, FieldValue] = {"budget": key, "kind": kind, "share": share, "amount": float(amount)}
            yield signal(event, "budget.reached", f"{key}.{kind}.{share}", limit=float(kept.budget.amount), **told)
        if kept is not before:
            world.budgets[key] = kept


def _set_aside(world: World, data: Any, name: str, kept: budgets.Kept) -> budgets.Kept:
    """For rounds that are open in the world, and for those only: a report of a run that has ended opens nothing."""
    match data:
        case RoundOpened(round=number, attempt=attempt):
            run = world.runs.get(name)
            is_open = isinstance(run, runs.Running) and run.attempt == attempt and number in run.rounds
            return budgets.reserve(kept, name, number) if is_open else kept
        case RoundClosed() | RoundAbandoned() | RunPauseRequested():
            return budgets.release(kept, name)
        case _:
            return kept


def _sum_up(world: World, lines: Iterable[Valued]) -> None:
    for each in lines:
        if not each.cost.cost:
            continue
        for dimension in anomalies.SCOPES:
            value = valuation.value_of(each, dimension)
            if value != valuation.UNALLOCATED:
                key = f"{dimension}/{value}"
                world.hourly[key] = anomalies.added(world.hourly.get(key, Map()), each.line.hour, each.cost.cost)


def _of_hours(world: World, event: Event, lines: list[Valued]) -> Iterator[Signal]:
    """What stands out of the hour that has passed, told with the first line of a later one."""
    hour = max((valued.line.hour for valued in lines), default=0)
    if hour <= world.hour:
        return
    passed, world.hour = world.hour, hour
    if passed // 24 < hour // 24 and NOBODY in world.ledger:
        world.ledger[NOBODY] = by_days(world.ledger[NOBODY], hour - 24 * KEPT_BY_HOUR_DAYS)
    for key in sorted(world.hourly):
        dimension, _, value = key.partition("/")
        found = anomalies.found(dimension, value, world.hourly[key], passed)
        if found is not None:
            told: dict[str, FieldValue] = {"dimension": dimension, "value": value, "hour": passed}
            sums = {"amount": float(found.amount), "usual": float(found.usual)}
            yield signal(event, "cost.anomaly", f"{key}.{passed}", **told, **sums)
