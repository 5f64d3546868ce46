"""A tensor seen through each place of a window that moves over it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Span = tuple[int, int, int]
"""Begin, end and step along one axis."""


def taps(x: Tensor, axis: int, spans: Sequence[Sequence[Span]]) -> list[Tensor]:
    """`x` cut along `axis` and the axes after it, for each combination of spans; that of the last axis changes fastest.

    What an outer axis leaves is shared by the inner ones: a cut is a copy in ONNX Runtime.
    """
    if not spans:
        return [x]
    cuts = [torch.ops.aten.slice(x, axis, *span) for span in spans[0]]
    return [tap for cut in cuts for tap in taps(cut, axis + 1, spans[1:])]
