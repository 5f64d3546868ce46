"""Ledger lines as rows of FOCUS 1.0, the FinOps foundation's format of bills (https://focus.finops.org). Pure.

Our own dimensions are in `Tags`, by the names under which OpenCost and Kubernetes know labels, so that rows can be
joined with a cloud bill. What the ledger has no word for is null, where FOCUS allows that.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from datetime import datetime, timedelta
from decimal import Decimal

from fedtide.fabric.messages.cost_views import CostLine
from fedtide.fabric.plans.prices import UNITS, Meter

_SERVICES: dict[str, tuple[str, str]] = {
    "cpu": ("Compute", "Edge and cluster CPU"),
    "memory": ("Compute", "Edge and cluster memory"),
    "gpu": ("AI and Machine Learning", "GPU"),
    "wan_down": ("Networking", "Data to regions"),
    "wan_up": ("Networking", "Data from regions"),
    "stored": ("Storage", "Streams"),
    "inferences": ("AI and Machine Learning", "Inference"),
}
_MEASURED: dict[Meter, str] = {"cpu": "hour", "memory": "GB-hour", "gpu": "hour", "stored": "GB-hour"}
_FOCUS_UNITS = {
    "second": "Seconds",
    "hour": "Hours",
    "month": "Months",
    "GB-hour": "GB-Hours",
    "GB-month": "GB-Months",
    "GiB-hour": "GiB-Hours",
    "GiB-month": "GiB-Months",
    "GB": "GB",
    "GiB": "GiB",
    "TB": "TB",
    "1": "Units",
    "1000": "Thousand Units",
    "million": "Million Units",
}
PROVIDER = "fedtide"


def rows(lines: Iterable[CostLine], currency: str, account: str) -> Iterator[dict[str, str | None]]:
    """A row for each line that says what was used and has a price, its columns in the order of the specification.

    Args:
        account: names who is billed.
    """
    for line in lines:
        if line.per:
            yield _row(line, currency, account)


def _row(line: CostLine, currency: str, account: str) -> dict[str, str | None]:
    ends, month = line.at + timedelta(hours=1), line.at.replace(day=1, hour=0)
    category, service = _SERVICES.get(line.meter, ("Other", line.meter))
    consumed_in = _MEASURED.get(line.meter, next(iter(UNITS[line.meter])))
    priced = Decimal(line.quantity) / UNITS[line.meter][line.per]
    region = line.region or "cloud"
    resource = next((line.tags[tag] for tag in ("run", "rollout") if tag in line.tags), None)
    return {
        "AvailabilityZone": None,
        "BilledCost": _number(line.cost),
        "BillingAccountId": account,
        "BillingAccountName": account,
        "BillingCurrency": currency,
        "BillingPeriodEnd": _moment((month + timedelta(days=32)).replace(day=1)),
        "BillingPeriodStart": _moment(month),
        "ChargeCategory": "Usage",
        "ChargeClass": None,
        "ChargeDescription": f"{line.meter} for {line.phase}, {line.outcome}",
        "ChargeFrequency": "Usage-Based",
        "ChargePeriodEnd": _moment(ends),
        "ChargePeriodStart": _moment(line.at),
        "CommitmentDiscountCategory": None,
        "CommitmentDiscountId": None,
        "CommitmentDiscountName": None,
        "CommitmentDiscountStatus": None,
        "CommitmentDiscountType": None,
        "ConsumedQuantity": _number(Decimal(line.quantity) / UNITS[line.meter][consumed_in]),
        "ConsumedUnit": _FOCUS_UNITS[consumed_in],
        "ContractedCost": _number(line.cost),
        "ContractedUnitPrice": _number(line.price),
        "EffectiveCost": _number(line.cost),
        "InvoiceIssuerName": PROVIDER,
        "ListCost": _number(line.list_cost),
        "ListUnitPrice": _number(line.list_price),
        "PricingCategory": "Standard" if line.list_cost == line.cost else "Dynamic",
        "PricingQuantity": _number(priced),
        "PricingUnit": _FOCUS_UNITS[line.per],
        "ProviderName": PROVIDER,
        "PublisherName": PROVIDER,
        "RegionId": region,
        "RegionName": region,
        "ResourceId": resource,
        "ResourceName": resource,
        "ResourceType": "Roll-out" if "rollout" in line.tags else "Run" if resource else None,
        "ServiceCategory": category,
        "ServiceName": service,
        "SkuId": line.meter,
        "SkuPriceId": "/".join(part for part in (line.meter, line.pool, line.phase, line.region) if part),
        "SubAccountId": line.tags.get("model"),
        "SubAccountName": line.tags.get("model"),
        "Tags": json.dumps(_tags(line), sort_keys=True),
    }


def _tags(line: CostLine) -> dict[str, str]:
    own = {"pool": line.pool, "phase": line.phase, "outcome": line.outcome, "round": str(line.round or "")}
    named = {name.removeprefix("label."): value for name, value in line.tags.items()}
    return {f"fedtide.dev/{name}": value for name, value in {**own, **named}.items() if value}


def _number(value: Decimal) -> str:
    return f"{value:.12f}"


def _moment(at: datetime) -> str:
    return f"{at:%Y-%m-%dT%H:%M:%SZ}"
