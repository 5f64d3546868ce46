"""A tensor frame read piece by piece, as its bytes arrive: it is never whole in memory.

Feed the frame in parts of any size; each piece that comes out is a run of whole elements of one tensor.
Pieces are views into what was fed, except for an element that a cut went through.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from fedtide.fabric.errors import MalformedMessage
from fedtide.fabric.tensors.frame import Buffer, TensorSpec, header_end, specs_of


@dataclass(frozen=True, slots=True)
class Piece:
    """Elements [start, start + len(data) / item size) of tensor number `index`."""

    index: int
    start: int
    data: memoryview


class FrameScanner:
    """Cuts one frame into pieces. `specs` is there once its header was fed."""

    def __init__(self, frame_bytes: int) -> None:
        self._frame_bytes = frame_bytes
        self._head = bytearray()
        self._torn = b""
        self._into = 0
        self._index = 0
        self._start = 0
        self.specs: list[TensorSpec] | None = None

    def feed(self, data: Buffer) -> Iterator[Piece]:
        """The pieces that `data` completes.

        Raises:
            MalformedMessage: the header lies, or there is more than `frame_bytes`.
        """
        view = memoryview(data)
        if self.specs is None:
            view = self._read_head(view)
        if self.specs is not None:
            yield from self._pieces(view, self.specs)

    @property
    def data_start(self) -> int:
        """Where the data begin, in bytes; known with `specs`."""
        return len(self._head)

    def skip(self, size: int) -> None:
        """Skip `size` bytes. An element that is only partly skipped is in no piece.

        Raises:
            MalformedMessage: the frame is not that long.
        """
        assert self.specs is not None
        self._into, self._torn = self._into + len(self._torn), b""
        while size > 0:
            if self._index == len(self.specs):
                raise MalformedMessage("tensor frame: trailing bytes")
            spec = self.specs[self._index]
            step = min(size, (spec.elements - self._start) * spec.item_bytes - self._into)
            size -= step
            whole, self._into = divmod(self._into + step, spec.item_bytes)
            self._advance(whole, self.specs)

    @property
    def done(self) -> bool:
        """Whether all of the frame was seen."""
        return self.specs is not None and self._index == len(self.specs)

    def _read_head(self, view: memoryview) -> memoryview:
        while len(self._head) < (end := self._head_end()):
            if not len(view):
                return view
            missing = end - len(self._head)
            self._head += view[:missing]
            view = view[missing:]
        self.specs = specs_of(bytes(self._head[8:]), self._frame_bytes - len(self._head))
        self._skip_empty(self.specs)
        return view

    def _head_end(self) -> int:
        return 8 if len(self._head) < 8 else header_end(bytes(self._head[:8]), self._frame_bytes)

    def _skip_empty(self, specs: list[TensorSpec]) -> None:
        while self._index < len(specs) and self._start == specs[self._index].elements:
            self._index += 1
            self._start = 0

    def _pieces(self, view: memoryview, specs: list[TensorSpec]) -> Iterator[Piece]:
        while len(view):
            if self._index == len(specs):
                raise MalformedMessage("tensor frame: trailing bytes")
            spec = specs[self._index]
            if self._into:
                view = self._drop_rest(view, spec, specs)
                continue
            if self._torn:
                missing = spec.item_bytes - len(self._torn)
                data, view = memoryview(self._torn + bytes(view[:missing])), view[missing:]
            else:
                size = min(len(view), (spec.elements - self._start) * spec.item_bytes)
                data, view = view[:size], view[size:]
            whole = len(data) - len(data) % spec.item_bytes
            self._torn = bytes(data[whole:])
            if whole:
                yield Piece(self._index, self._start, data[:whole])
                self._advance(whole // spec.item_bytes, specs)

    def _drop_rest(self, view: memoryview, spec: TensorSpec, specs: list[TensorSpec]) -> memoryview:
        """Drop the rest of an element that was partly skipped."""
        dropped = min(len(view), spec.item_bytes - self._into)
        self._into += dropped
        if self._into == spec.item_bytes:
            self._into = 0
            self._advance(1, specs)
        return view[dropped:]

    def _advance(self, elements: int, specs: list[TensorSpec]) -> None:
        self._start += elements
        self._skip_empty(specs)
