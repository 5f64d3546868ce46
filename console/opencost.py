"""An OpenCost allocation beside the ledger: the same pods, seen by those who rent the machines. Pure.

OpenCost (https://opencost.io/docs/integrations/api) allocates what a cluster's pods have *requested or* used, at list
prices; the ledger books what our processes have used, at the price book's. So it is the larger number that tells how
much of what was reserved was of use.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from decimal import Decimal

from pydantic import BaseModel, Field, ValidationError, computed_field

from fedtide.fabric.errors import ConfigError
from fedtide.fabric.messages.cost_views import CostRow
from fedtide.fabric.plans.prices import UNITS, Meter
from fedtide.fabric.strict import Strict

LABEL = "fedtide.dev/run"
_SANITIZED = "fedtide_dev_run"
"""Prometheus has no dots and slashes in names, so OpenCost has not either."""
ASK = f"GET /allocation?window=7d&aggregate=label:{LABEL}&accumulate=true"
NO_RUN = "no run"


class _Window(BaseModel):
    start: datetime
    end: datetime


class _Properties(BaseModel):
    labels: dict[str, str] | None = None


class _Allocation(BaseModel):
    name: str
    window: _Window
    properties: _Properties | None = None
    cpu_hours: Decimal = Field(default=Decimal(0), alias="cpuCoreHours", ge=0)
    ram_byte_hours: Decimal = Field(default=Decimal(0), alias="ramByteHours", ge=0)
    gpu_hours: Decimal = Field(default=Decimal(0), alias="gpuHours", ge=0)
    cost: Decimal = Field(alias="totalCost")


class _Answer(BaseModel):
    data: list[dict[str, _Allocation] | None]


@dataclass
class Allocated:
    """Of one run's pods: hours of cores, of GB and of GPUs, and what they cost."""

    cost: Decimal = Decimal(0)
    hours: dict[Meter, Decimal] = field(default_factory=dict)

    def add(self, cost: Decimal, **hours: Decimal) -> None:
        self.cost += cost
        self.hours = {meter: self.hours.get(meter, Decimal(0)) + hours[meter] for meter in ("cpu", "memory", "gpu")}


@dataclass(frozen=True)
class Allocation:
    """What OpenCost has answered, by run; what is of no run is under NO_RUN."""

    since: datetime
    until: datetime
    runs: Mapping[str, Allocated]


def read(text: str, path: str) -> Allocation:
    """Raises ConfigError: it is no answer of OpenCost's allocation API, or an empty one."""
    try:
        sets = _Answer.model_validate_json(text).data
    except ValidationError as exc:
        raise ConfigError(path, f"is no allocation of OpenCost: {exc.errors()[0]['msg']}", f"Ask it: {ASK}") from exc
    found = [allocation for each in sets for allocation in (each or {}).values()]
    if not found:
        raise ConfigError(path, "holds no allocation", f"Ask for a time with runs: {ASK}")
    runs: dict[str, Allocated] = {}
    for each in found:
        labels = (each.properties.labels if each.properties is not None else None) or {}
        run = labels.get(_SANITIZED) or labels.get(LABEL) or each.name
        name = NO_RUN if run.startswith("__") else run
        runs.setdefault(name, Allocated()).add(
            each.cost, cpu=each.cpu_hours, memory=each.ram_byte_hours / 10**9, gpu=each.gpu_hours
        )
    return Allocation(min(each.window.start for each in found), max(each.window.end for each in found), runs)


class Compared(Strict):
    """One run: in the ledger (its aggregators in the cloud), and in OpenCost. `hours`: of both, by meter."""

    run: str
    ledger: Decimal
    opencost: Decimal
    hours: dict[Meter, tuple[Decimal, Decimal]]

    @computed_field  # type: ignore[prop-decorator]  # as pydantic's documentation has it
    @property
    def difference(self) -> Decimal:
        return self.opencost - self.ledger

    @computed_field  # type: ignore[prop-decorator]
    @property
    def share_used(self) -> Decimal | None:
        """Of the core-hours that OpenCost has allocated; None: it has none."""
        booked, allocated = self.hours["cpu"]
        return booked / allocated if allocated else None


def compared(rows: Iterable[CostRow], allocation: Allocation) -> list[Compared]:
    """All runs that either knows, those that differ most first.

    Args:
        rows: of the ledger by run, of aggregators only, in the same time.
    """
    booked = {row.group["run"]: row for row in rows}
    meters: dict[Meter, str] = {"cpu": "hour", "memory": "GB-hour", "gpu": "hour"}
    found = []
    for run in {*booked, *allocation.runs}:
        row, allocated = booked.get(run), allocation.runs.get(run, Allocated())
        used = row.quantities if row is not None else {}
        hours = {
            meter: (Decimal(used.get(meter, 0)) / UNITS[meter][unit], allocated.hours.get(meter, Decimal(0)))
            for meter, unit in meters.items()
        }
        ledger = row.cost if row is not None else Decimal(0)
        found.append(Compared(run=run, ledger=ledger, opencost=allocated.cost, hours=hours))
    return sorted(found, key=lambda each: (-abs(each.difference), each.run))
