"""What costs money, as events of the log: what long-running processes have used, prices, budgets."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from fedtide.fabric.messages.usage import Quantity, Usage
from fedtide.fabric.plans.prices import Budget, Phase, PriceBook
from fedtide.fabric.strict import Message, TaggedMessage


class UsedFor(Message):
    """What was used in one place for one purpose."""

    region: str = Field(default="", description="Empty: the cloud")
    pool: str = ""
    phase: Phase
    wasted: str = Field(default="", description="Why it was of no use; empty: it was")
    usage: Usage = Usage()
    inferences: Quantity = 0
    stored_kb_s: Quantity = Field(default=0, description="Bytes in streams over time, in kB times seconds")


class Availability(Message):
    """Of one region's nodes, at one time."""

    nodes: int = Field(ge=0)
    free: int = Field(ge=0, description="Online, and without a task")


class UsageReported(TaggedMessage):
    """What no other event tells: agents between tasks, coordinators, stores. Since the report before."""

    kind: Literal["usage.reported"] = "usage.reported"
    source: str = Field(description="Which process adds it up")
    items: list[UsedFor] = Field(max_length=10_000)
    available: dict[str, Availability] = Field(default={}, description="By region, now; for forecasts")


class PricesApplied(TaggedMessage):
    """A new price book. The ledger holds quantities: what was used before is valued by it as well."""

    kind: Literal["prices.applied"] = "prices.applied"
    book: PriceBook
    by: str = "cli"


class BudgetApplied(TaggedMessage):
    """A budget is new, or was changed; what of it was told is not told again."""

    kind: Literal["budget.applied"] = "budget.applied"
    budget: Budget
    by: str = "cli"


class BudgetRemoved(TaggedMessage):
    kind: Literal["budget.removed"] = "budget.removed"
    name: str
    by: str = "cli"
