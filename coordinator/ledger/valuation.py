"""What lines of the ledger cost by a price book, and sums of them. Pure.

Each line is rounded once, to 12 decimals of the currency; every sum is one of lines, so all of them agree.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import date, datetime
from decimal import ROUND_HALF_EVEN, Context, Decimal
from functools import lru_cache
from typing import NamedTuple

from fedtide.coordinator.ledger.accounts import USEFUL, Account, Line
from fedtide.fabric.plans.prices import UNITS, Meter, Price, PriceBook

_SMALLEST = Decimal("1e-12")
_CONTEXT = Context(prec=60, rounding=ROUND_HALF_EVEN)
ZERO = Decimal(0)
UNALLOCATED, CLOUD, NO_POOL = "unallocated", "cloud", "other"


class Cost(NamedTuple):
    """`listed`: without discounts."""

    cost: Decimal
    listed: Decimal


class Valued(NamedTuple):
    """One line of one account, with what it costs."""

    subject: str
    tags: Mapping[str, str]
    line: Line
    quantity: int
    cost: Cost


class Valuer:
    """Prices lines by one book."""

    def __init__(self, book: PriceBook) -> None:
        self.book = book
        self._prices: dict[Meter, list[Price]] = {}
        for price in sorted(book.prices, key=_breadth):
            self._prices.setdefault(price.meter, []).append(price)
        self.price_of = lru_cache(maxsize=50_000)(self._price_of)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Valuer) and self.book == other.book

    __hash__ = None  # type: ignore[assignment]  # equal by its book, which holds a list

    def _price_of(self, meter: Meter, day: date, scope: tuple[str, str, str]) -> Price | None:
        for price in self._prices.get(meter, []):
            fits = all(wanted in ("", has) for wanted, has in zip(price.scope, scope, strict=True))
            if fits and (price.since or date.min) <= day < (price.until or date.max):
                return price
        return None

    def cost(self, line: Line, quantity: int) -> Cost:
        """Of a quantity of what a line is about; what was avoided costs nothing."""
        return Cost(ZERO, ZERO) if line.meter == "wan_avoided" else self._value(line, quantity)

    def saved(self, line: Line, quantity: int) -> Decimal:
        """What the bytes of a line `wan_avoided` would have cost on the link."""
        return self._value(line._replace(meter="wan_down"), quantity).cost

    def price_for(self, line: Line) -> Price | None:
        """The price that holds for a line."""
        return self.price_of(line.meter, line.at.date(), (line.pool or NO_POOL, line.phase, line.region or CLOUD))

    def _value(self, line: Line, quantity: int) -> Cost:
        price = self.price_for(line)
        if price is None:
            return Cost(ZERO, ZERO)
        unit = UNITS[line.meter][price.per]
        cost = _times(quantity, price.price, unit)
        return Cost(cost, cost if price.list_price is None else _times(quantity, price.list_price, unit))


def _breadth(price: Price) -> tuple[int, tuple[bool, ...]]:
    """Narrow scopes first; of equally many fields the pool counts before phase and region."""
    missing = tuple(not part for part in price.scope)
    return sum(missing), missing


def _times(quantity: int, price: Decimal, unit: Decimal) -> Decimal:
    exact = _CONTEXT.divide(_CONTEXT.multiply(Decimal(quantity), price), unit)
    return exact.quantize(_SMALLEST, context=_CONTEXT)


@dataclass
class Total:
    """Of some lines. `wasted`: the part of `cost` whose outcome is not `useful`; `quantities` by meter."""

    cost: Decimal = ZERO
    listed: Decimal = ZERO
    wasted: Decimal = ZERO
    wan_saved: Decimal = ZERO
    lines: int = 0
    quantities: dict[Meter, int] = field(default_factory=dict)

    def add(self, valued: Valued, wan_saved: Decimal) -> None:
        self.cost += valued.cost.cost
        self.listed += valued.cost.listed
        self.wasted += ZERO if outcome(valued) == USEFUL else valued.cost.cost
        self.wan_saved += wan_saved
        self.lines += 1
        meter = valued.line.meter
        self.quantities[meter] = self.quantities.get(meter, 0) + valued.quantity


def outcome(valued: Valued) -> str:
    """`useful`, or why not: what a run has used that failed was of no use."""
    return valued.tags.get("ended", USEFUL) if valued.line.outcome == USEFUL else valued.line.outcome


DIMENSIONS: Mapping[str, Callable[[Valued], str]] = {
    "region": lambda v: v.line.region or CLOUD,
    "pool": lambda v: v.line.pool or NO_POOL,
    "phase": lambda v: v.line.phase,
    "outcome": outcome,
    "meter": lambda v: v.line.meter,
    "round": lambda v: str(v.line.round) if v.line.round else UNALLOCATED,
    "hour": lambda v: f"{v.line.at:%Y-%m-%dT%H:00Z}",
    "day": lambda v: f"{v.line.at:%Y-%m-%d}",
    "month": lambda v: f"{v.line.at:%Y-%m}",
}
"""What costs are told apart by, beside an account's tags: `TAGS`, and label.NAME."""
TAGS = ("model", "app", "run", "release", "rollout", "by", "purpose")


def value_of(valued: Valued, dimension: str) -> str:
    """Where a line belongs in a group-by; what belongs nowhere is `unallocated`."""
    of_line = DIMENSIONS.get(dimension)
    return of_line(valued) if of_line is not None else valued.tags.get(dimension) or UNALLOCATED


def valued(
    ledger: Mapping[str, Account],
    valuer: Valuer,
    since: datetime | None = None,
    until: datetime | None = None,
    where: Mapping[str, str] | None = None,
) -> Iterator[Valued]:
    """All lines from `since` until before `until` (hours are whole), of those that are as `where` says."""
    for subject, account in ledger.items():
        wanted = {name: want for name, want in (where or {}).items() if name in DIMENSIONS}
        if any((account.tags.get(n) or UNALLOCATED) != want for n, want in (where or {}).items() if n not in wanted):
            continue
        for key, quantity in account.lines.items():
            line = Line.of(key)
            if (since is not None and line.at < since) or (until is not None and line.at >= until):
                continue
            found = Valued(subject, account.tags, line, quantity, valuer.cost(line, quantity))
            if all(value_of(found, name) == want for name, want in wanted.items()):
                yield found


def totals(lines: Iterable[Valued], valuer: Valuer, by: tuple[str, ...]) -> dict[tuple[str, ...], Total]:
    """Sums by the values of some dimensions, those that cost most first."""
    found: dict[tuple[str, ...], Total] = {}
    for each in lines:
        saved = valuer.saved(each.line, each.quantity) if each.line.meter == "wan_avoided" else ZERO
        found.setdefault(tuple(value_of(each, d) for d in by), Total()).add(each, saved)
    return dict(sorted(found.items(), key=lambda item: (-item[1].cost, item[0])))
