"""Sensors of the machine: temperature, battery, CPU time. Linux; None if there is no such sensor."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import psutil

_THERMAL = Path("/sys/class/thermal")
_POWER = Path("/sys/class/power_supply")


@dataclass(frozen=True, slots=True)
class Battery:
    """`charge` is 0 to 1."""

    charge: float
    charging: bool


def hottest_celsius(root: Path = _THERMAL) -> float | None:
    """The hottest thermal zone (https://docs.kernel.org/driver-api/thermal/sysfs-api.html: millidegrees)."""
    found = [_number(zone / "temp") for zone in sorted(root.glob("thermal_zone*"))]
    known = [value / 1000 for value in found if value is not None]
    return max(known, default=None)


def battery(root: Path = _POWER) -> Battery | None:
    """The emptiest battery; one that is full, or on mains, counts as charging."""
    found = []
    for supply in sorted(root.glob("*")):
        if _text(supply / "type") != "Battery":
            continue
        charge = _number(supply / "capacity")
        if charge is not None:
            found.append(Battery(charge / 100, _text(supply / "status") in ("Charging", "Full", "Not charging")))
    return min(found, key=lambda b: b.charge, default=None)


def cpu_seconds(group: int) -> float:
    """CPU time that the processes of a process group have used so far."""
    used = 0.0
    for pid in psutil.pids():
        try:
            if os.getpgid(pid) == group:
                times = psutil.Process(pid).cpu_times()
                used += times.user + times.system
        except (psutil.Error, ProcessLookupError):
            continue
    return used


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def _number(path: Path) -> float | None:
    try:
        return float(_text(path))
    except ValueError:
        return None
