"""The ledger as the API shows it. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import datetime
from decimal import Decimal

from fedtide.coordinator.ledger import budgets
from fedtide.coordinator.ledger.valuation import DIMENSIONS, TAGS, ZERO, Total, Valued, Valuer, outcome, totals
from fedtide.fabric.errors import ConfigError
from fedtide.fabric.messages.cost_views import BudgetView, CostLine, CostRow, CostView
from fedtide.fabric.plans.prices import Meter

_PER: Mapping[str, tuple[Meter, int]] = {
    "update": ("updates", 1),
    "round": ("rounds", 1),
    "release": ("releases", 1),
    "node updated": ("nodes_updated", 1),
    "1000 inferences": ("inferences", 1000),
}
_COUNTED = frozenset(
    {"updates", "rounds", "releases", "nodes_updated", "inferences", "wan_avoided", "received", "sent"}
)
"""What need not have a price."""
_SIX = Decimal("1e-6")


def check_dimensions(path: str, names: Iterable[str]) -> None:
    """Raises ConfigError for one that costs are not told apart by."""
    for name in names:
        if name not in DIMENSIONS and name not in TAGS and not name.startswith("label."):
            known = ", ".join([*TAGS, *DIMENSIONS, "label.NAME"])
            raise ConfigError(path, f"costs are not told apart by {name!r}", f"Known: {known}")


def costs(
    lines: Iterable[Valued], valuer: Valuer, by: list[str], since: datetime | None, until: datetime | None
) -> CostView:
    kept = list(lines)
    (total,) = totals(kept, valuer, ()).values() or (Total(),)
    groups = totals(kept, valuer, tuple(by))
    return CostView(
        currency=valuer.book.currency,
        by=by,
        since=since,
        until=until,
        rows=[_row(dict(zip(by, key, strict=True)), each) for key, each in groups.items()],
        total=_row({}, total),
        unpriced=_unpriced(kept, valuer),
    )


def _unpriced(lines: Iterable[Valued], valuer: Valuer) -> list[Meter]:
    return sorted({v.line.meter for v in lines if v.line.meter not in _COUNTED and valuer.price_for(v.line) is None})


def _row(group: dict[str, str], total: Total) -> CostRow:
    counts = {name: total.quantities.get(meter, 0) // size for name, (meter, size) in _PER.items()}
    per = {name: (total.cost / count).quantize(_SIX) for name, count in counts.items() if count}
    return CostRow(
        group=group,
        cost=total.cost,
        list_cost=total.listed,
        wasted=total.wasted,
        wan_saved=total.wan_saved,
        quantities=total.quantities,
        per=per,
        lines=total.lines,
    )


def line(valued: Valued, valuer: Valuer) -> CostLine:
    at, price = valued.line, valuer.price_for(valued.line)
    return CostLine(
        key=key_of(valued),
        at=at.at,
        meter=at.meter,
        quantity=valued.quantity,
        cost=valued.cost.cost,
        list_cost=valued.cost.listed,
        outcome=outcome(valued),
        round=at.round,
        region=at.region,
        pool=at.pool,
        phase=at.phase,
        tags=dict(valued.tags),
        per=price.per if price is not None else "",
        price=price.price if price is not None else ZERO,
        list_price=ZERO if price is None else price.price if price.list_price is None else price.list_price,
    )


def key_of(valued: Valued) -> str:
    return f"{valued.subject}|{valued.line.key}"


def budget(kept: budgets.Kept, at: datetime) -> BudgetView:
    now = budgets.in_period(kept, at)
    start, end = budgets.period_of(now.budget, at)
    is_spent = now.committed >= now.budget.amount and now.budget.when_spent != "tell"
    verb = {"hold": "new rounds are held", "throttle": "rounds ask fewer nodes"}.get(now.budget.when_spent, "")
    return BudgetView(
        budget=now.budget,
        began=start if end.year < datetime.max.year else None,
        ends=end if end.year < datetime.max.year else None,
        spent=now.spent,
        reserved=now.set_aside,
        forecast=budgets.forecast(now, at),
        told=list(now.told),
        holds=verb if is_spent else "",
    )
