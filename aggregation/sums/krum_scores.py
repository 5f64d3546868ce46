"""Krum: which updates lie closest to their neighbours.

Blanchard et al. 2017, https://papers.nips.cc/paper/6617-machine-learning-with-adversaries-byzantine-tolerant-gradient-descent.
Pairwise distances come from one Gram matrix, summed over shards of the model; updates are taken relative to the
model that went out, so that small differences of large values are not lost.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from fedtide.aggregation.sums.agreement import ready
from fedtide.fabric.tensors.frame import Tensor

_SHARD_ELEMENTS = 1 << 21
"""Elements of all updates together that are in memory at once, in float64 (16 MiB)."""

Matrix = npt.NDArray[np.float64]


def squared_distances(base: Sequence[Tensor], updates: Sequence[Sequence[Tensor]]) -> Matrix:
    """|x_i - x_j|^2 over all tensors, shape (n, n); the tensors of `updates` stand in the order of `base`."""
    count = len(updates)
    gram = np.zeros((count, count))
    shard = max(1, _SHARD_ELEMENTS // count)
    for index, tensor in enumerate(base):
        centre = ready(tensor.dtype, tensor.data)
        rows = [ready(u[index].dtype, u[index].data) for u in updates]
        for low in range(0, centre.size, shard):
            part = np.stack([r[low : low + shard] for r in rows]).astype(np.float64)
            part -= centre[low : low + shard]
            gram += part @ part.T
    norms = np.diag(gram)
    return np.maximum(norms[:, None] + norms[None, :] - 2 * gram, 0.0)


def closest(distances: Matrix, neighbours: int, select: int) -> list[int]:
    """The `select` updates whose `neighbours` nearest others are nearest, best first; ties by index."""
    count = len(distances)
    others: Any = distances + np.diag(np.full(count, np.inf))
    scores = np.sort(others, axis=1)[:, : min(neighbours, count - 1)].sum(axis=1)
    return [int(k) for k in np.argsort(scores, kind="stable")[:select]]
