"""Wheels that travel with an app: which of them fit this interpreter (PEP 425, PEP 427)."""

from __future__ import annotations

from packaging.tags import sys_tags
from packaging.utils import InvalidWheelFilename, parse_wheel_filename


def fitting(names: list[str]) -> list[str]:
    """Those of the file names whose wheels can be installed here; what is no wheel is not."""
    here = frozenset(sys_tags())
    return [name for name in names if _tags(name) & here]


def _tags(name: str) -> frozenset[object]:
    try:
        return frozenset(parse_wheel_filename(name)[3])
    except InvalidWheelFilename:
        return frozenset()
