"""Frames that are read piece by piece, in any cuts, with parts left out."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtide.fabric.errors import MalformedMessage
from fedtide.fabric.tensors.frame import Tensor, encode
from fedtide.fabric.tensors.scanner import FrameScanner

TENSORS = [
    Tensor.of("a", np.arange(15, dtype="f4").reshape(3, 5)),
    Tensor.of("empty", np.zeros((0, 3))),
    Tensor.of("b", np.arange(3, dtype="i1")),  # from here on nothing is aligned
    Tensor.of("c", np.arange(40, dtype="f8")),
    Tensor.of("scalar", np.array(3.5)),
    Tensor.of("last", np.zeros((0,))),
]
FRAME = b"".join(encode(TENSORS))


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 2**32))
def test_any_cuts_give_every_element_once(seed: int) -> None:
    order, scanner = random.Random(seed), FrameScanner(len(FRAME))
    got = [bytearray() for _ in TENSORS]
    rest = FRAME
    while rest:
        cut = order.randint(1, 60)
        for piece in scanner.feed(rest[:cut]):
            assert piece.start * TENSORS[piece.index].spec.item_bytes == len(got[piece.index])
            got[piece.index] += piece.data
        rest = rest[cut:]
    assert scanner.done
    assert [bytes(g) for g in got] == [bytes(t.data) for t in TENSORS]


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 2**32))
def test_what_is_skipped_is_left_out_and_the_rest_is_in_its_place(seed: int) -> None:
    order, scanner = random.Random(seed), FrameScanner(len(FRAME))
    assert list(scanner.feed(FRAME[: len(FRAME) - sum(len(t.data) for t in TENSORS)])) == []
    at = scanner.data_start
    seen: set[tuple[int, int]] = set()
    fed: list[tuple[int, int]] = []
    while at < len(FRAME):
        size = min(order.randint(1, 30), len(FRAME) - at)
        if order.random() < 0.5:
            scanner.skip(size)
        else:
            fed.append((at, at + size))
            for piece in scanner.feed(FRAME[at : at + size]):
                item = TENSORS[piece.index].spec.item_bytes
                for k in range(len(piece.data) // item):
                    element = bytes(TENSORS[piece.index].data)[(piece.start + k) * item :][:item]
                    assert bytes(piece.data[k * item :][:item]) == element
                    seen.add((piece.index, piece.start + k))
        at += size
    assert scanner.done
    assert seen == _whole_within(_joined(fed), scanner.data_start)


def _joined(runs: list[tuple[int, int]]) -> list[tuple[int, int]]:
    joined: list[tuple[int, int]] = []
    for low, high in runs:
        if joined and joined[-1][1] == low:
            joined[-1] = (joined[-1][0], high)
        else:
            joined.append((low, high))
    return joined


def _whole_within(runs: list[tuple[int, int]], at: int) -> set[tuple[int, int]]:
    whole = set()
    for index, tensor in enumerate(TENSORS):
        item = tensor.spec.item_bytes
        for k in range(tensor.spec.elements):
            if any(low <= at + k * item and at + (k + 1) * item <= high for low, high in runs):
                whole.add((index, k))
        at += len(tensor.data)
    return whole


def test_more_than_the_frame_is_refused() -> None:
    scanner = FrameScanner(len(FRAME))
    list(scanner.feed(FRAME))
    with pytest.raises(MalformedMessage, match="trailing"):
        list(scanner.feed(b"x"))
    with pytest.raises(MalformedMessage, match="trailing"):
        scanner.skip(1)


def test_a_header_that_lies_is_refused_as_soon_as_it_is_there() -> None:
    with pytest.raises(MalformedMessage, match="out of range"):
        list(FrameScanner(20).feed(FRAME[:8]))
    with pytest.raises(MalformedMessage):
        list(FrameScanner(len(FRAME) + 1).feed(FRAME))
