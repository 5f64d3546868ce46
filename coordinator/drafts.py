"""Changes to a table that do not count yet: they are seen through the draft, and the table stays as it is. Pure."""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping
from typing import TypeVar

K = TypeVar("K")
V = TypeVar("V")

_GONE = object()


class Draft(MutableMapping[K, V]):
    """A table with changes, over the table without them. The order of iteration is that of the table after `commit`."""

    __slots__ = ("_changed", "_moved", "_table")

    def __init__(self, table: MutableMapping[K, V]) -> None:
        self._table = table
        self._changed: dict[K, V | object] = {}
        self._moved: set[K] = set()
        """Removed and set again: they come last."""

    def __getitem__(self, key: K) -> V:
        if key in self._changed:
            value = self._changed[key]
            if value is _GONE:
                raise KeyError(key)
            return value  # type: ignore[return-value]  # not _GONE, so a V
        return self._table[key]

    def __setitem__(self, key: K, value: V) -> None:
        if self._changed.get(key) is _GONE:
            del self._changed[key]
            self._moved.add(key)
        self._changed[key] = value

    def __delitem__(self, key: K) -> None:
        if key not in self:
            raise KeyError(key)
        self._changed[key] = _GONE

    def __contains__(self, key: object) -> bool:
        if key in self._changed:
            return self._changed[key] is not _GONE
        return key in self._table

    def __iter__(self) -> Iterator[K]:
        for key in self._table:
            if self._changed.get(key) is not _GONE and key not in self._moved:
                yield key
        for key, value in self._changed.items():
            if value is not _GONE and (key in self._moved or key not in self._table):
                yield key

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def commit(self) -> None:
        """Make the changes to the table below."""
        if not self._changed:
            return
        for key in self._moved:
            self._table.pop(key, None)
        for key, value in self._changed.items():
            if value is _GONE:
                self._table.pop(key, None)
            else:
                self._table[key] = value  # type: ignore[assignment]  # not _GONE, so a V
        self._changed.clear()
        self._moved.clear()
