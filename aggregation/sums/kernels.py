"""The inner loops of sums on a CPU, compiled by numba (docs/decisions/0010-sum-kernel.md says why).

A term is rounded to an integer by adding MAGIC = 1.5 * 2**52: the low bits of the float64 are
then the integer (|term| < 2**51; Hacker's Delight, 2nd ed., section 17-4). This vectorises where
a conversion to int64 does not (AVX2), and rounds to nearest, ties to even, like `rint`.

The same pass detects terms that do not fit. `move_overflow_to_coarse` then undoes the effect of NaN, infinity and large
terms on the sum by repeating the arithmetic. All kernels release the GIL.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba as nb
import numpy as np
import numpy.typing as npt

Lane = npt.NDArray[np.int64]

MAGIC = np.float64(6755399441055744.0)
_MAGIC_BITS = MAGIC.view(np.int64)


def compiled(*signatures: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Compile now; kept on disk beside the code or, where that is read-only, in a folder of this user."""

    def compile_(function: Callable[..., Any]) -> Callable[..., Any]:
        with contextlib.suppress(RuntimeError):
            return nb.njit(list(signatures), nogil=True, cache=True)(function)
        return nb.njit(list(signatures), nogil=True)(function)

    return compile_


if not os.access(Path(__file__).parent, os.W_OK):
    os.environ.setdefault("NUMBA_CACHE_DIR", str(Path(tempfile.gettempdir(), f"fedtide-kernels-{os.getuid()}")))

_i64, _f64 = nb.int64, nb.float64
_LANE = _i64[::1]


def _in(kind: Any) -> Any:
    return nb.types.Array(kind, 1, "C", readonly=True)


_F32, _F64 = _in(nb.float32), _in(nb.float64)


@compiled(*(_i64(_LANE, k, k, k, k, _f64, _f64, _f64, _f64, _i64) for k in (_F32, _F64)))
def fold4(lane: Any, a: Any, b: Any, c: Any, d: Any, fa: Any, fb: Any, fc: Any, fd: Any, half: Any) -> Any:
    """Add a * fa + b * fb + c * fc + d * fd. Terms must be in [-half, half), a power of two.

    Returns a number that is negative or at least 2 * half if some are not: then call
    `move_overflow_to_coarse` for each input.
    """
    shift = _MAGIC_BITS - half
    seen = np.int64(0)
    for i in range(lane.size):
        p = np.float64(np.float64(a[i]) * fa + MAGIC).view(np.int64) - shift
        q = np.float64(np.float64(b[i]) * fb + MAGIC).view(np.int64) - shift
        r = np.float64(np.float64(c[i]) * fc + MAGIC).view(np.int64) - shift
        s = np.float64(np.float64(d[i]) * fd + MAGIC).view(np.int64) - shift
        seen |= p | q | r | s
        lane[i] += p + q + r + s - 4 * half
    return seen


@compiled(*(_i64(_LANE, k, _f64, _i64, _i64) for k in (_F32, _F64)))
def fold1(lane: Any, a: Any, factor: Any, half: Any, sign: Any) -> Any:
    """Add `sign` (1 or -1) times the terms a * factor; returns as `fold4` does."""
    shift = _MAGIC_BITS - half
    seen = np.int64(0)
    if sign > 0:
        for i in range(lane.size):
            p = np.float64(np.float64(a[i]) * factor + MAGIC).view(np.int64) - shift
            seen |= p
            lane[i] += p - half
    else:
        for i in range(lane.size):
            p = np.float64(np.float64(a[i]) * factor + MAGIC).view(np.int64) - shift
            seen |= p
            lane[i] -= p - half
    return seen


@compiled(*(_i64(_LANE, _LANE, k, _f64, _i64, _i64, _f64) for k in (_F32, _F64)))
def move_overflow_to_coarse(lane: Any, coarse: Any, a: Any, factor: Any, half: Any, sign: Any, unit: Any) -> Any:
    """Remove the terms that do not fit from the lane, and add them to the coarse lane, in units of `unit` fine ones.

    Returns 1 if some values are not finite, else 2 if some fit no lane, else 0. Such values are in no lane.
    """
    shift = _MAGIC_BITS - half
    worst = np.int64(0)
    for i in range(lane.size):
        term = np.float64(a[i]) * factor
        p = np.float64(term + MAGIC).view(np.int64) - shift
        if p < 0 or p >= 2 * half:
            lane[i] -= sign * (p - half)
            p = np.float64(term / unit + MAGIC).view(np.int64) - shift
            if not abs(a[i]) < np.inf:
                worst = np.int64(1)
            elif p < 0 or p >= 2 * half:
                worst = worst if worst == 1 else np.int64(2)
            else:
                coarse[i] += sign * (p - half)
    return worst


@compiled(_f64(_F32), _f64(_F64))
def largest(a: Any) -> Any:
    """The largest magnitude; infinite if there is an infinity or NaN."""
    found = np.float64(0)
    bad = np.int32(0)
    for i in range(a.size):
        magnitude = np.float64(abs(a[i]))
        bad |= np.int32(not magnitude < np.inf)
        found = magnitude if magnitude > found else found
    return np.inf if bad else found


@compiled(*(_f64(k, k, k, k) for k in (_F32, _F64)))
def product_of_gaps(a: Any, b: Any, c: Any, d: Any) -> Any:
    """The scalar product of a - b and c - d, in float64 and in one order on every machine: eight running sums."""
    sums = np.zeros(8)
    whole = a.size - a.size % 8
    for low in range(0, whole, 8):
        p, q, r, s = a[low : low + 8], b[low : low + 8], c[low : low + 8], d[low : low + 8]
        for k in range(8):
            sums[k] += (np.float64(p[k]) - np.float64(q[k])) * (np.float64(r[k]) - np.float64(s[k]))
    rest = 0.0
    for k in range(whole, a.size):
        rest += (np.float64(a[k]) - np.float64(b[k])) * (np.float64(c[k]) - np.float64(d[k]))
    return sums.sum() + rest


def _mean(kind: Any) -> Any:
    return nb.void(kind, _LANE, _f64, _f64)


@compiled(_mean(nb.float32[::1]), _mean(nb.float64[::1]))
def mean_of_fine(out: Any, fine: Any, unit: Any, total: Any) -> None:
    """fine * unit / total, where `unit` is a power of two."""
    for i in range(out.size):
        out[i] = np.float64(fine[i]) * unit / total


def _plain(kind: Any) -> Any:
    return nb.void(_f64[::1], kind, _f64)


@compiled(_plain(_F32), _plain(_F64))
def fold_float(lane: Any, a: Any, factor: Any) -> None:
    """Add in float64: the order of terms matters."""
    for i in range(lane.size):
        lane[i] += np.float64(a[i]) * factor
