"""What each event does to the ledger and to budgets, and what rules hear of it. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from datetime import datetime
from decimal import Decimal

from fedtide.coordinator.ledger import anomalies, booking, budgets, valuation
from fedtide.coordinator.ledger.accounts import Account, Entry
from fedtide.coordinator.ledger.valuation import Valued, Valuer
from fedtide.coordinator.signals import signal
from fedtide.coordinator.state import World
from fedtide.fabric.errors import NotFound
from fedtide.fabric.events.costs import BudgetApplied, BudgetRemoved, PricesApplied
from fedtide.fabric.events.envelope import Event
from fedtide.fabric.events.runs import RoundAbandoned, RoundClosed, RoundOpened
from fedtide.fabric.plans.trigger_rule import FieldValue, Signal


def book(world: World, event: Event) -> list[Signal]:
    """Take an event into the ledger and the budgets; what rules may act upon."""
    name = booking.subject(event)
    entry = Entry(_account(world, name))
    booking.book(entry, event, _where(world, name))
    lines = [Valued(name, entry.account.tags, line, n, world.valuer.cost(line, n)) for line, n in entry.lines]
    if entry.account is not world.ledger.get(name):
        world.ledger[name] = entry.account
    return [*_of_budgets(world, event, name, entry.account, lines), *_of_hours(world, event, lines)]


def ended(world: World, key: str, outcome: str) -> None:
    """A run or roll-out is over; `outcome`: why what it used was of no use, empty if it was."""
    if key in world.ledger:
        entry = Entry(world.ledger[key])
        entry.tag(ended=outcome)
        world.ledger[key] = entry.account
    for budget, kept in world.budgets.items():
        world.budgets[budget] = budgets.release(kept, key)


def prices_applied(world: World, data: PricesApplied, at: datetime) -> None:
    """What was used before is valued anew, and so are the budgets."""
    world.valuer = Valuer(data.book)
    for name, kept in world.budgets.items():
        world.budgets[name] = _begun(world, kept, at)


def budget_applied(world: World, data: BudgetApplied, at: datetime) -> None:
    before = world.budgets.get(data.budget.name)
    start, _ = budgets.period_of(data.budget, at)
    kept = budgets.Kept(data.budget, start) if before is None else replace(before, budget=data.budget)
    world.budgets[data.budget.name] = _begun(world, kept, at)


def budget_removed(world: World, data: BudgetRemoved) -> None:
    world.budgets.pop(data.name, None)


def _begun(world: World, before: budgets.Kept, at: datetime) -> budgets.Kept:
    return budgets.begun(before.budget, at, valuation.valued(world.ledger, world.valuer), before)


def held(world: World, key: str, granted: Mapping[str, Decimal]) -> str | None:
    """Why the next round of a run is held, or None."""
    for kept in _holding(world, key):
        if kept.budget.when_spent == "hold" and (reason := budgets.why_not(kept, key, granted)) is not None:
            return reason
    return None


def share_of_nodes(world: World, key: str) -> float:
    """Which share of its nodes the next round of a run may ask."""
    spent = [k.budget for k in _holding(world, key) if k.budget.when_spent == "throttle" and budgets.why_not(k, key)]
    return min((budget.throttle_to for budget in spent), default=1.0)


def expected(world: World, key: str) -> Decimal:
    """What the next round of a run is expected to cost, by the budget that says most."""
    return max((budgets.expected(kept, key) for kept in _holding(world, key)), default=valuation.ZERO)


def why_no_waves(world: World, key: str) -> str | None:
    """Why a roll-out may begin no new waves, or None."""
    for kept in _holding(world, key):
        if kept.budget.when_spent == "hold" and kept.spent >= kept.budget.amount:
            return f"the budget {kept.budget.name} is spent"
    return None


def _holding(world: World, key: str) -> Iterator[budgets.Kept]:
    tags = _account(world, key).tags
    return (kept for kept in world.budgets.values() if budgets.is_for(kept.budget, tags))


def _account(world: World, name: str) -> Account:
    if (account := world.ledger.get(name)) is not None:
        return account
    run = world.runs.get(name)  # one that was requested before there was a ledger
    return Account(booking.tags_of_run(name, run.facts.spec, run.facts.by)) if run is not None else Account()


def _where(world: World, name: str) -> booking.Where:
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
    return booking.Where(node, release_bytes, run.facts.requested_at if run is not None else None)


def _of_budgets(world: World, event: Event, name: str, account: Account, lines: list[Valued]) -> Iterator[Signal]:
    for key, before in world.budgets.items():
        kept = budgets.spend(budgets.in_period(before, event.time), lines)
        if budgets.is_for(kept.budget, account.tags) and name in world.runs:
            match event.data:
                case RoundOpened(phase=phase) if phase.startswith("train"):
                    kept = budgets.reserve(kept, name)
                case RoundClosed() | RoundAbandoned():
                    kept = budgets.release(kept, name)
        for kind, share, amount in budgets.reached(kept, event.time):
            kept = replace(kept, told=(*kept.told, f"{kind} {share}"))
            told: dict[str, FieldValue] = {"budget": key, "kind": kind, "share": share, "amount": float(amount)}
            yield signal(event, "budget.reached", f"{key}.{kind}.{share}", limit=float(kept.budget.amount), **told)
        if kept is not before:
            world.budgets[key] = kept


def _of_hours(world: World, event: Event, lines: list[Valued]) -> Iterator[Signal]:
    """What stands out of the hours that have passed since the last line."""
    hour = max((valued.line.hour for valued in lines), default=0)
    if hour <= world.hour:
        return
    passed, world.hour = world.hour, hour
    if passed:
        for found in anomalies.found(valuation.valued(world.ledger, world.valuer), passed):
            told: dict[str, FieldValue] = {"dimension": found.dimension, "value": found.value, "hour": passed}
            sums = {"amount": float(found.amount), "usual": float(found.usual)}
            yield signal(event, "cost.anomaly", f"{found.dimension}.{found.value}.{passed}", **told, **sums)
