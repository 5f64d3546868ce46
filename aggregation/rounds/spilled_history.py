"""The metrics of all rounds, of which large ones are in a file: lists of a thousand rounds do not fit into memory."""

from __future__ import annotations

import json
from collections.abc import ItemsView, Iterator, ValuesView
from pathlib import Path
from typing import Any

from flwr.app import MetricRecord

SMALL_BYTES = 4096
"""Larger records are in the file."""


class SpilledHistory(dict[int, MetricRecord]):
    """Metrics by round: the dict of Flower's `Result`."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self._file = file
        self._spilled: dict[int, tuple[int, int]] = {}

    def __getitem__(self, number: int) -> MetricRecord:
        if number not in self._spilled:
            return super().__getitem__(number)
        begin, length = self._spilled[number]
        with self._file.open("rb") as file:
            file.seek(begin)
            return MetricRecord(json.loads(file.read(length)))

    def __setitem__(self, number: int, record: MetricRecord) -> None:
        text = json.dumps(dict(record)).encode()
        self._spilled.pop(number, None)
        if len(text) > SMALL_BYTES:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            with self._file.open("ab") as file:
                self._spilled[number] = file.tell(), len(text)
                file.write(text)
            record = MetricRecord()  # keeps the key's place
        super().__setitem__(number, record)

    # What follows is in C for a dict, and would not see the file.

    def __iter__(self) -> Iterator[int]:  # so that dict(history) asks for each value
        return iter(list(super().__iter__()))

    def get(self, number: int, default: Any = None) -> Any:
        if number in self:
            return self[number]
        return default

    def pop(self, number: int, *default: Any) -> Any:
        if number not in self and default:
            return default[0]
        record = self[number]
        del self[number]
        return record

    def values(self) -> Any:
        return ValuesView(self)

    def items(self) -> Any:
        return ItemsView(self)

    def copy(self) -> dict[int, MetricRecord]:
        return dict(self.items())

    def __eq__(self, other: object) -> bool:
        return self.copy() == (other.copy() if isinstance(other, SpilledHistory) else other)

    __hash__ = None

    def __repr__(self) -> str:
        return repr(self.copy())

    def __reduce__(self) -> tuple[Any, ...]:
        return dict, (self.copy(),)
