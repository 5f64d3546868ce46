"""What things cost: a dated price book, and budgets. Pure data.

A line of the ledger costs quantity times price. Money is Decimal, in one currency.
"""

from __future__ import annotations

from datetime import date
from decimal import Decimal
from itertools import combinations
from typing import Annotated, Literal, get_args

from pydantic import Field, field_validator, model_validator

from fedtide.fabric.ids import NAME
from fedtide.fabric.strict import Request

Meter = Literal[
    "cpu",
    "memory",
    "gpu",
    "wan_down",
    "wan_up",
    "wan_avoided",
    "received",
    "sent",
    "stored",
    "inferences",
    "updates",
    "rounds",
    "releases",
    "nodes_updated",
]
Phase = Literal["train", "evaluate", "aggregate", "distribute", "serve", "idle", "coordinate", "store", "other"]

_TIME = {"second": Decimal(1_000_000), "hour": Decimal(3_600_000_000), "month": Decimal(2_628_000_000_000)}
_SPACE = {
    "GB-hour": Decimal(3_600_000_000),
    "GB-month": Decimal(2_628_000_000_000),
    "GiB-hour": Decimal("3865470566.4"),
    "GiB-month": Decimal("2821793513472"),
}
_BYTES = {"GB": Decimal(10**9), "GiB": Decimal(2**30), "TB": Decimal(10**12)}
_COUNT = {"1": Decimal(1), "1000": Decimal(1000), "million": Decimal(10**6)}
UNITS: dict[Meter, dict[str, Decimal]] = {
    "cpu": _TIME,
    "memory": _SPACE,
    "gpu": _TIME,
    "wan_down": _BYTES,
    "wan_up": _BYTES,
    "wan_avoided": _BYTES,
    "received": _BYTES,
    "sent": _BYTES,
    "stored": _SPACE,
    "inferences": _COUNT,
    "updates": _COUNT,
    "rounds": _COUNT,
    "releases": _COUNT,
    "nodes_updated": _COUNT,
}
"""How much of a meter one unit is. Meters count µs, kB times seconds, bytes, or things; a month has 730 hours."""
SHOWN_IN: dict[Meter, str] = {
    meter: {id(_TIME): "hour", id(_SPACE): "GB-hour", id(_BYTES): "GB"}.get(id(units), "1")
    for meter, units in UNITS.items()
}
"""The unit in which quantities are shown."""

_PRICED = tuple(meter for meter in UNITS if meter != "wan_avoided")
Money = Annotated[Decimal, Field(ge=0, max_digits=24, decimal_places=12)]


class Price(Request):
    """The price of one meter. Of several that fit a line the narrowest holds; pool counts before phase and region."""

    meter: Meter
    price: Money = Field(description="Of one unit")
    per: str = Field(description="The unit: second, hour, month; GB-hour, GB-month; GB, TB; 1, 1000, million")
    list_price: Money | None = Field(
        default=None, description="Of one unit without a discount, such as that of spot machines"
    )
    region: str = Field(default="", description="Empty: all")
    pool: str = Field(default="", description="Hardware class of nodes, or tier of aggregators; empty: all")
    phase: Phase | Literal[""] = Field(default="", description="Empty: all")
    since: date | None = Field(default=None, description="First day (UTC) on which it holds; none: always did")
    until: date | None = Field(default=None, description="First day on which it holds no more")

    @field_validator("meter")
    @classmethod
    def _costs(cls, meter: Meter) -> Meter:
        if meter not in _PRICED:
            raise ValueError("is what was saved: it is valued at the price of wan_down")
        return meter

    @model_validator(mode="after")
    def _sound(self) -> Price:
        if self.per not in UNITS[self.meter]:
            raise ValueError(f"per: {self.meter} is priced per {', '.join(UNITS[self.meter])}, not {self.per!r}")
        if self.since is not None and self.until is not None and self.until <= self.since:
            raise ValueError("until: it ends before it begins")
        return self

    @property
    def scope(self) -> tuple[str, str, str]:
        return self.pool, self.phase, self.region

    def overlaps(self, other: Price) -> bool:
        """Whether both hold for the same line at some time."""
        begins, ends = self.since or date.min, self.until or date.max
        return begins < (other.until or date.max) and (other.since or date.min) < ends


class PriceBook(Request):
    """All prices there were, are and will be. What has no price costs nothing."""

    currency: str = Field(default="EUR", pattern=r"^[A-Z]{3}$", description="ISO 4217")
    prices: list[Price] = Field(default=[], max_length=1000)

    @model_validator(mode="after")
    def _one_each(self) -> PriceBook:
        for a, b in combinations(self.prices, 2):
            if (a.meter, a.scope) == (b.meter, b.scope) and a.overlaps(b):
                where = ", ".join(part for part in a.scope if part) or "everywhere"
                raise ValueError(
                    f"prices: two prices of {a.meter} hold at the same time ({where}): give one an `until`"
                )
        return self


Dimension = Literal["model", "app", "run", "by", "region", "pool", "phase", "purpose"]


class Budget(Request):
    """How much something may cost in a period, and what happens when it does."""

    name: str = Field(pattern=NAME)
    scope: dict[str, str] = Field(
        default={},
        description="What it is for: model, app, run, by, region, pool, phase, label.NAME; empty: everything",
    )
    period: Literal["day", "week", "month", "total"] = "month"
    amount: Money = Field(gt=0)
    tell_at: list[Annotated[float, Field(gt=0, le=10)]] = Field(
        default=[0.5, 0.8, 1.0], max_length=20, description="Shares of the amount; each is told once a period"
    )
    forecast_at: list[Annotated[float, Field(gt=0, le=10)]] = Field(
        default=[1.0], max_length=20, description="The same for what the period is expected to cost"
    )
    when_spent: Literal["tell", "throttle", "hold"] = Field(
        default="tell",
        description="throttle: rounds ask fewer nodes; hold: no new rounds and waves. A roll-back is never held",
    )
    throttle_to: float = Field(default=0.5, gt=0, lt=1, description="Share of the nodes that a throttled round asks")

    @field_validator("scope")
    @classmethod
    def _known(cls, scope: dict[str, str]) -> dict[str, str]:
        for name in scope:
            if name not in get_args(Dimension) and not name.startswith("label."):
                known = ", ".join(get_args(Dimension))
                raise ValueError(f"there is no {name!r} to tell costs apart by; known: {known}, label.NAME")
        return scope

    @model_validator(mode="after")
    def _can_act(self) -> Budget:
        partial = sorted(self.scope.keys() & {"region", "pool", "phase"})
        if self.when_spent != "tell" and partial:
            raise ValueError(f"when_spent: a round is held as a whole, and {partial[0]} is part of one: use tell")
        return self
