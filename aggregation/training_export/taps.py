"""Slices of a tensor, one for each position in a moving window."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Span = tuple[int, int, int]
"""Begin, end and step along one axis."""


def taps(x: Tensor, axis: int, spans: Sequence[Sequence[Span]]) -> list[Tensor]:
    """`x` cut along `axis` and the axes after it, for each combination of spans; that of the last axis changes fastest.

    Cuts along an outer axis are shared by the inner ones, since each cut is a copy in ONNX Runtime.
    """
    if not spans:
        return [x]
    cuts = [torch.ops.aten.slice(x, axis, *span) for span in spans[0]]
    return [tap for cut in cuts for tap in taps(cut, axis + 1, spans[1:])]
