"""How much of each budget is spent, what was told of it, and whether another round may begin. Pure.

A round's cost is known when it is over, so it is reserved before: what the run's rounds have cost so far, on average. A
run that has no round yet reserves what those of other runs in the budget cost, and if there is none all that is left:
the first round of a new kind runs alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from decimal import Decimal

from immutables import Map

from fedtide.coordinator.ledger.valuation import UNALLOCATED, ZERO, Valued, value_of
from fedtide.fabric.plans.prices import Budget

_FOREVER = datetime.max.replace(tzinfo=UTC)


@dataclass(frozen=True, slots=True)
class Spent:
    """By one run: what it has cost, and in how many rounds."""

    cost: Decimal = ZERO
    rounds: int = 0

    @property
    def a_round(self) -> Decimal | None:
        return self.cost / self.rounds if self.rounds else None


@dataclass(frozen=True, slots=True)
class Reserved:
    """For one round of a run, while it is open."""

    round: int
    cost: Decimal


@dataclass(frozen=True, slots=True)
class Kept:
    """A budget in its current period. `told`: thresholds that were told. `runs`: those within it, in all periods.

    `reserved`: for open rounds, by run.
    """

    budget: Budget
    began: datetime
    spent: Decimal = ZERO
    told: tuple[str, ...] = ()
    runs: Map[str, Spent] = field(default_factory=Map)
    reserved: Map[str, Reserved] = field(default_factory=Map)

    @property
    def committed(self) -> Decimal:
        return self.spent + self.set_aside

    @property
    def set_aside(self) -> Decimal:
        return sum((each.cost for each in self.reserved.values()), ZERO)


def period_of(budget: Budget, at: datetime) -> tuple[datetime, datetime]:
    """Begin and end of the period that `at` is in, in UTC; weeks begin on Mondays."""
    day = at.astimezone(UTC).replace(hour=0, minute=0, second=0, microsecond=0)
    match budget.period:
        case "day":
            return day, day + timedelta(days=1)
        case "week":
            monday = day - timedelta(days=day.weekday())
            return monday, monday + timedelta(days=7)
        case "month":
            first = day.replace(day=1)
            return first, (first + timedelta(days=32)).replace(day=1)
        case _:
            return datetime.min.replace(tzinfo=UTC), _FOREVER


def begun(budget: Budget, at: datetime, lines: Iterable[Valued], before: Kept | None = None) -> Kept:
    """A budget as it stands, from the ledger's lines; what was told of it in this period stays told."""
    start, _ = period_of(budget, at)
    kept = Kept(budget, start)
    if before is not None and before.began == start:
        kept = replace(kept, told=before.told, reserved=before.reserved)
    for valued in lines:
        if concerns(budget, valued):
            kept = _add(kept, valued, counts=valued.line.at >= start)
    still = tuple(t for t in kept.told if not t.startswith("actual") or kept.spent >= budget.amount * _share(t))
    return replace(kept, told=still)


def _share(told: str) -> Decimal:
    return Decimal(told.split()[1])


def concerns(budget: Budget, valued: Valued) -> bool:
    """Whether a line counts in a budget."""
    return all(value_of(valued, dimension) == wanted for dimension, wanted in budget.scope.items())


def is_for(budget: Budget, tags: Mapping[str, str]) -> bool:
    """Whether a run or roll-out with these tags is within the budget's scope."""
    return all((tags.get(dimension) or UNALLOCATED) == wanted for dimension, wanted in budget.scope.items())


def in_period(kept: Kept, at: datetime) -> Kept:
    """The same budget, begun anew if its period is over."""
    start, _ = period_of(kept.budget, at)
    return kept if start <= kept.began else Kept(kept.budget, start, runs=kept.runs, reserved=kept.reserved)


def spend(kept: Kept, lines: Iterable[Valued]) -> Kept:
    for valued in lines:
        if concerns(kept.budget, valued):
            kept = _add(kept, valued)
    return kept


def _add(kept: Kept, valued: Valued, *, counts: bool = True) -> Kept:
    before = kept.runs.get(valued.subject, Spent())
    rounds = before.rounds + (valued.quantity if valued.line.meter == "rounds" else 0)
    runs = kept.runs.set(valued.subject, Spent(before.cost + valued.cost.cost, rounds)) if valued.subject else kept.runs
    return replace(kept, spent=kept.spent + (valued.cost.cost if counts else ZERO), runs=runs)


def expected(kept: Kept, run: str) -> Decimal:
    """What the next round of a run is expected to cost."""
    own = kept.runs.get(run, Spent()).a_round
    if own is not None:
        return own
    others = [spent for spent in kept.runs.values() if spent.rounds]
    if others:
        return sum((s.cost for s in others), ZERO) / sum(s.rounds for s in others)
    return max(kept.budget.amount - kept.committed, ZERO)


def reserve(kept: Kept, run: str, number: int) -> Kept:
    before = kept.reserved.get(run)
    if before is not None and before.round == number:
        return kept
    return replace(kept, reserved=kept.reserved.set(run, Reserved(number, expected(kept, run))))


def release(kept: Kept, run: str) -> Kept:
    return replace(kept, reserved=kept.reserved.delete(run)) if run in kept.reserved else kept


def why_not(kept: Kept, run: str, number: int, granted: Mapping[str, Decimal]) -> str | None:
    """Why a round of a run may not begin now, or None.

    Args:
        granted: what was set aside in this budget for rounds of other runs that may begin and are not open yet.
    """
    own = kept.reserved.get(run)
    if own is not None and own.round == number:
        return None
    budget, set_aside = kept.budget, kept.set_aside + sum(granted.values(), ZERO)
    left = budget.amount - kept.spent - set_aside
    spent = f"{kept.spent:.2f} of {budget.amount:.2f} are spent"
    if own is not None:
        return f"the budget {budget.name} waits for the end of round {own.round}"
    if left > 0 and (cost := expected(kept, run)) <= left:
        return None
    if left > 0:
        return f"the budget {budget.name} has {left:.4g} left, and the round is expected to cost {cost:.4g}; {spent}"
    aside = f" and {set_aside:.4g} set aside for other rounds" if set_aside else ""
    return f"the budget {budget.name} is used up: {spent}{aside}"


def forecast(kept: Kept, at: datetime) -> Decimal | None:
    """What the period will have cost at its end if it goes on as so far; None before a tenth of it is over."""
    start, end = period_of(kept.budget, at)
    if end == _FOREVER:
        return None
    share = (at - start) / (end - start)
    return kept.spent / Decimal(str(share)) if share >= 0.1 else None


def reached(kept: Kept, at: datetime) -> Iterator[tuple[str, float, Decimal]]:
    """Thresholds that are reached and were not told: `actual` or `forecast`, the share, and the sum."""
    predicted = forecast(kept, at)
    for kind, shares, amount in (
        ("actual", kept.budget.tell_at, kept.spent),
        ("forecast", kept.budget.forecast_at, predicted),
    ):
        if amount is None:
            continue
        for share in sorted(shares):
            if amount >= kept.budget.amount * Decimal(str(share)) and f"{kind} {share}" not in kept.told:
                yield kind, share, amount
