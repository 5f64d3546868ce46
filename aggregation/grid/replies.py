"""A lazy sequence of replies that can be walked more than once.

flwr's grids return lists, and code written for them counts, indexes and walks them twice. Here
the first walk yields each reply when it arrives; what was seen is remembered for the next.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import overload

from flwr.app import Message


class Replies(Sequence[Message]):
    """Wraps an iterator; `len` and indexing wait for what they need."""

    def __init__(self, source: Iterator[Message]) -> None:
        self._source = source
        self._seen: list[Message] = []

    def __iter__(self) -> Iterator[Message]:
        index = 0
        while index < len(self._seen) or self._advance():
            yield self._seen[index]
            index += 1

    def once(self) -> Iterator[Message]:
        """The replies for a single walk; none is kept."""
        return self._source

    def __len__(self) -> int:
        while self._advance():
            pass
        return len(self._seen)

    @overload
    def __getitem__(self, index: int) -> Message: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Message]: ...
    def __getitem__(self, index: int | slice) -> Message | Sequence[Message]:
        if isinstance(index, int) and index >= 0:
            while len(self._seen) <= index and self._advance():
                pass
        else:
            len(self)
        return self._seen[index]

    def _advance(self) -> bool:
        for message in self._source:
            self._seen.append(message)
            return True
        return False
