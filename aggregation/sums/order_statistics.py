"""Medians and trimmed means per coordinate, over all updates at once, in cache-sized tiles on all cores.

Columns are sorted by a sorting network (Batcher 1968, "Sorting networks and their applications"), because its
comparisons do not depend on the data and so run on whole vectors of columns. What is summed is
in sorted order: the order of updates does not show.

Updates are views: in memory, or on mapped files, of which only the tiles at hand need be in memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numba as nb
import numpy as np
import numpy.typing as npt
from numba import carray  # type: ignore[attr-defined]
from numba.core import cgutils, types
from numba.extending import intrinsic

from fedtide.aggregation.sums.agreement import mean_dtype, ready
from fedtide.aggregation.sums.device import THREADS, Values, on_all_cores
from fedtide.aggregation.sums.kernels import compiled
from fedtide.aggregation.sums.weighted_sum import BLOCK
from fedtide.fabric.tensors.frame import Tensor, TensorSpec

Pairs = npt.NDArray[np.int64]


def _as_pointer(context: Any, address: Any) -> Any:
    """An address as a pointer: numba takes no list of arrays in compiled code."""

    def generate(_: Any, builder: Any, __: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], cgutils.voidptr_t)

    return types.voidptr(address), generate


_pointer: Any = intrinsic(_as_pointer)


def _keys(key: Any) -> Any:
    return nb.void(key[::1], key[::1], key, key)


@compiled(_keys(nb.int32), _keys(nb.int64))
def _flip(to: Any, bits: Any, sign: Any, below: Any) -> None:
    """Map float bits to integers of the same order, and back: if the sign is set, invert the other bits."""
    for i in range(to.size):
        to[i] = bits[i] ^ ((bits[i] >> sign) & below)


def _network(key: Any) -> Any:
    return nb.void(key[:, ::1], nb.int64[:, ::1], nb.int64)


@compiled(_network(nb.int32), _network(nb.int64))
def _sort_columns(tile: Any, pairs: Any, width: Any) -> None:
    """Sort as integers: the minimum and maximum of floats compile to masked stores, four times slower."""
    for pair in range(pairs.shape[0]):
        upper, lower = tile[pairs[pair, 0]][:width], tile[pairs[pair, 1]][:width]
        for i in range(width):
            x, y = upper[i], lower[i]
            upper[i] = min(x, y)
            lower[i] = max(x, y)


def _middle(item: Any, key: Any) -> Any:
    return nb.void(item[::1], key[::1], nb.uint64[::1], nb.int64[:, ::1], nb.int64, nb.int64, key, key)


@compiled(_middle(nb.float32, nb.int32), _middle(nb.float64, nb.int64))
def _middle_mean(out: Any, keys: Any, addresses: Any, pairs: Any, low: Any, high: Any, sign: Any, below: Any) -> None:
    """out[i] = mean of the elements of rank low .. high - 1 among the rows' i-th elements; `keys` is `out`'s bits."""
    rows, columns = addresses.size, out.size
    wide = max(64, 4096 // rows)
    tile = np.empty((rows, wide), keys.dtype)
    total = np.empty(wide)
    for start in range(0, columns, wide):
        width = min(wide, columns - start)
        for k in range(rows):
            source = carray(_pointer(addresses[k]), columns, keys.dtype)
            _flip(tile[k][:width], source[start : start + width], sign, below)
        _sort_columns(tile, pairs, width)
        if high - low == 1:
            _flip(keys[start : start + width], tile[low][:width], sign, below)
            continue
        total[:] = 0.0
        for k in range(low, high):
            row = tile[k][:width]
            _flip(row, row, sign, below)
            values = row.view(out.dtype)
            for i in range(width):
                total[i] += values[i]
        out[start : start + width] = total[:width] / (high - low)


@lru_cache(maxsize=64)
def network(rows: int, low: int, high: int) -> Pairs:
    """Comparisons (i, j), i < j, after which rows low .. high - 1 hold the elements of these ranks."""
    wires = 1 << max(0, rows - 1).bit_length()
    pairs: list[tuple[int, int]] = []
    p = 1
    while p < wires:
        k = p
        while k >= 1:
            for j in range(k % p, wires - k, 2 * k):
                upto = min(k, wires - j - k)
                pairs += [(i, i + k) for i in range(j, j + upto) if i // (2 * p) == (i + k) // (2 * p)]
            k //= 2
        p *= 2
    # Wires beyond `rows` would hold infinity: comparing with them changes nothing. Of the others only
    # those that a wanted rank depends on are needed.
    needed, wanted = [], set(range(low, high))
    for i, j in reversed([(i, j) for i, j in pairs if j < rows]):
        if i in wanted or j in wanted:
            wanted |= {i, j}
            needed.append((i, j))
    return np.array(needed[::-1], np.int64).reshape(-1, 2)


def middle_mean(
    base: Sequence[Tensor], updates: Sequence[Sequence[Tensor]], low: int, high: int, threads: int = THREADS
) -> list[Tensor]:
    """Per coordinate the mean of the values of rank low .. high - 1 among the updates.

    Args:
        base: the model; it alone decides the dtypes of the result, which are those of a weighted mean.
        updates: the same tensors in the same order, finite, of any dtypes.
    """
    pairs = network(len(updates), low, high)
    columns = [[update[index] for update in updates] for index in range(len(base))]
    return [_of_one_tensor(b.spec, c, pairs, low, high, threads) for b, c in zip(base, columns, strict=True)]


def _of_one_tensor(
    spec: TensorSpec, tensors: Sequence[Tensor], pairs: Pairs, low: int, high: int, threads: int
) -> Tensor:
    rows: list[Values] = [ready(t.dtype, t.data) for t in tensors]
    if len({r.dtype for r in rows}) > 1:
        rows = [r.astype(np.float64) for r in rows]
    out = np.empty(rows[0].size, rows[0].dtype)
    key, bits = (np.int32, 31) if out.dtype == np.float32 else (np.int64, 63)

    def work(begin: int) -> None:
        part = [r[begin : begin + BLOCK] for r in rows]
        addresses = np.array([p.ctypes.data for p in part], np.uint64)
        to = out[begin : begin + BLOCK]
        _middle_mean(to, to.view(key), addresses, pairs, low, high, key(bits), key((1 << bits) - 1))

    on_all_cores(work, range(0, out.size, BLOCK), threads)
    return Tensor.of(spec.name, out.astype(mean_dtype(spec.dtype), copy=False).reshape(spec.shape))


def median_ranks(count: int) -> tuple[int, int]:
    """The ranks whose mean is the median of `count` values."""
    return (count - 1) // 2, count // 2 + 1


def _extremes(item: Any) -> Any:
    return nb.void(item[:, ::1], item[:, ::1], nb.types.Array(item, 1, "C", readonly=True))


@compiled(_extremes(nb.float32), _extremes(nb.float64))
def keep_extremes(largest: Any, smallest: Any, values: Any) -> None:
    """Keep per coordinate the f largest and f smallest values seen (f rows each; at first -inf and inf)."""
    for i in range(values.size):
        high = low = values[i]
        for k in range(largest.shape[0]):
            held = largest[k, i]
            largest[k, i] = high if high > held else held
            high = held if high > held else high
            kept = smallest[k, i]
            smallest[k, i] = low if low < kept else kept
            low = kept if low < kept else low
