"""What the API answers about costs. Pure data. Money is Decimal (a string in JSON); quantities are whole numbers."""

from __future__ import annotations

from datetime import datetime
from decimal import Decimal

from pydantic import Field

from fedtide.fabric.plans.prices import Budget, Meter
from fedtide.fabric.strict import Strict


class CostRow(Strict):
    """One group of the ledger's lines."""

    group: dict[str, str] = Field(description="By dimension; `unallocated`: it belongs nowhere")
    cost: Decimal
    list_cost: Decimal = Field(description="Without discounts, such as those of spot machines")
    wasted: Decimal = Field(description="The part of `cost` that was of no use")
    wan_saved: Decimal = Field(description="What bytes that regions keep would have cost on the link")
    quantities: dict[Meter, int] = Field(description="In µs, kB times seconds, bytes, or things")
    per: dict[str, Decimal] = Field(description="Cost of one update, round, release, node updated, 1000 inferences")
    lines: int


class CostView(Strict):
    """Costs, by what was asked for. The rows add up to `total`, to the last decimal."""

    currency: str
    by: list[str]
    since: datetime | None
    until: datetime | None
    rows: list[CostRow]
    total: CostRow
    unpriced: list[Meter] = Field(description="Meters with quantities that no price fits")


class CostLine(Strict):
    """One line of the ledger, with what it costs."""

    key: str
    at: datetime = Field(description="Begin of the hour")
    meter: Meter
    quantity: int
    cost: Decimal
    list_cost: Decimal
    outcome: str
    round: int = Field(description="0: none")
    region: str
    pool: str
    phase: str
    tags: dict[str, str]
    per: str = Field(description="The unit that the price is of; empty: no price")
    price: Decimal
    list_price: Decimal


class BudgetView(Strict):
    """How a budget stands in its current period."""

    budget: Budget
    began: datetime | None = Field(description="Of the period; none: it has no begin and no end")
    ends: datetime | None
    spent: Decimal
    reserved: Decimal = Field(description="For rounds that are open")
    forecast: Decimal | None = Field(description="At the end of the period, if it goes on like this; none: too early")
    told: list[str] = Field(description="Thresholds that were reached in this period")
    holds: str = Field(default="", description="Why rounds are held or throttled; empty: they are not")
