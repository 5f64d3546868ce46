"""How values are written on the page: units always stand beside numbers."""

from __future__ import annotations

from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

from fedtide.fabric.plans.prices import SHOWN_IN, UNITS, Meter


def size(count: float | None) -> str:
    """Bytes."""
    if count is None:
        return "–"
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def duration(seconds: float | None) -> str:
    if seconds is None:
        return "–"
    if seconds < 60:
        return f"{seconds:.1f} s"
    if seconds < 3600:
        return f"{seconds / 60:.1f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 172_800 else f"{seconds / 86_400:.1f} days"


def moment(at: datetime | None) -> str:
    return f"{at.astimezone(UTC):%Y-%m-%d %H:%M:%S} UTC" if at is not None else "–"


def number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"


def of(count: int, thing: str) -> str:
    """So many of them: 1 round, 2 rounds."""
    return f"{count:,} {thing}{'' if count == 1 else 's'}"


def money(value: Decimal, currency: str) -> str:
    if 0 < value < Decimal("0.001"):
        return f"< 0.001 {currency}"
    return f"{value:,.2f} {currency}" if value >= 1 or not value else f"{value:.3f} {currency}"


def amount(quantity: int, meter: Meter) -> str:
    unit = SHOWN_IN[meter]
    value = Decimal(quantity) / UNITS[meter][unit]
    if unit == "1":
        return f"{quantity:,}"
    small = bool(quantity) and value < Decimal("0.001")
    return f"{'< 0.001' if small else f'{value:.4g}'} {unit}{'s' if unit == 'hour' else ''}"


FILTERS: dict[str, Any] = {
    "size": size,
    "duration": duration,
    "moment": moment,
    "number": number,
    "money": money,
    "of": of,
    "amount": amount,
}
