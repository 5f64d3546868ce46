"""Chooses, in one place, where sums are computed: on a GPU if there is one, else on the CPU.

Both give the same integers: a term is x * factor in float64, rounded to nearest with ties to even
(IEEE 754), and integers add in any order.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from functools import cache
from typing import Any, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from fedtide.aggregation.sums import kernels

T = TypeVar("T")
Values = npt.NDArray[Any]
"""Flat, contiguous, aligned, read-only; float32 or float64."""

THREADS = len(os.sched_getaffinity(0))


class Device(Protocol):
    """Sums in one kind of memory. A lane holds int64, of as many elements as its inputs.

    `half` is a power of two: terms of [-half, half) fit a lane.
    """

    name: str

    def lane(self, elements: int, *, exact: bool = True) -> Any:
        """Zeros: int64, or float64 if not `exact`."""

    def fold(self, lane: Any, inputs: list[Values], factors: list[float], half: int, sign: int) -> bool:
        """Add `sign` times the rounded terms of all inputs; on False, call `move_overflow_to_coarse` for each input."""

    def move_overflow_to_coarse(
        self, lane: Any, coarse: Any, values: Values, factor: float, half: int, sign: int, unit: float
    ) -> int:
        """Move the terms that do not fit the lane to `coarse`, in multiples of `unit`.

        Returns 1 if some values are not finite, else 2 if some fit no lane, else 0. Such values are in no lane.
        """

    def fold_float(self, lane: Any, values: Values, factor: float) -> None:
        """Add float64 terms to a float64 lane."""

    def host(self, lane: Any) -> npt.NDArray[Any]:
        """A lane as numpy."""

    def load(self, lane: npt.NDArray[Any]) -> Any:
        """The opposite."""


class Cpu:
    """numba kernels."""

    name = "cpu"

    def lane(self, elements: int, *, exact: bool = True) -> Any:
        return np.zeros(elements, np.int64 if exact else np.float64)

    def fold(self, lane: Any, inputs: list[Values], factors: list[float], half: int, sign: int) -> bool:
        if len(inputs) == 4 and sign > 0 and len({v.dtype for v in inputs}) == 1:
            return bool(0 <= kernels.fold4(lane, *inputs, *factors, half) < 2 * half)
        seen = [kernels.fold1(lane, v, f, half, sign) for v, f in zip(inputs, factors, strict=True)]
        return all(0 <= s < 2 * half for s in seen)

    def move_overflow_to_coarse(
        self, lane: Any, coarse: Any, values: Values, factor: float, half: int, sign: int, unit: float
    ) -> int:
        return int(kernels.move_overflow_to_coarse(lane, coarse, values, factor, half, sign, unit))

    def fold_float(self, lane: Any, values: Values, factor: float) -> None:
        kernels.fold_float(lane, values, factor)

    def host(self, lane: Any) -> npt.NDArray[Any]:
        return lane  # type: ignore[no-any-return]

    def load(self, lane: npt.NDArray[Any]) -> Any:
        return lane


class Torch:
    """Sums on a torch device: each piece is uploaded once, and lanes stay on the device."""

    def __init__(self, name: str) -> None:
        import torch

        self.name = name
        self._torch = torch
        self._device = torch.device(name)

    def lane(self, elements: int, *, exact: bool = True) -> Any:
        kind = self._torch.int64 if exact else self._torch.float64
        return self._torch.zeros(elements, dtype=kind, device=self._device)

    def _upload(self, values: Values) -> Any:
        return self._torch.as_tensor(values.copy(), device=self._device).double()

    def fold(self, lane: Any, inputs: list[Values], factors: list[float], half: int, sign: int) -> bool:
        every = True
        for values, factor in zip(inputs, factors, strict=True):
            terms = (self._upload(values) * factor).round()
            fits = (terms >= -half) & (terms < half)
            every = bool(fits.all()) and every
            lane += sign * self._torch.where(fits, terms, 0.0).long()
        return every

    def move_overflow_to_coarse(
        self, lane: Any, coarse: Any, values: Values, factor: float, half: int, sign: int, unit: float
    ) -> int:
        uploaded = self._upload(values)
        terms, large = (uploaded * factor).round(), (uploaded * factor / unit).round()
        rest = ~((terms >= -half) & (terms < half))
        fits = (large >= -half) & (large < half)
        coarse += sign * self._torch.where(rest & fits, large, 0.0).long()
        if not bool(uploaded.isfinite().all()):
            return 1
        return 2 if bool((rest & ~fits).any()) else 0

    def fold_float(self, lane: Any, values: Values, factor: float) -> None:
        lane += self._upload(values) * factor

    def host(self, lane: Any) -> npt.NDArray[Any]:
        return lane.cpu().numpy()  # type: ignore[no-any-return]

    def load(self, lane: npt.NDArray[Any]) -> Any:
        return self._torch.as_tensor(lane.copy(), device=self._device)


@cache
def choose() -> Device:
    """CUDA if torch finds it, else the CPU; `FEDTIDE_DEVICE` (cpu, cuda, cuda:1 ...) decides otherwise."""
    wanted = os.environ.get("FEDTIDE_DEVICE")
    if wanted is None and os.path.exists("/dev/nvidiactl"):  # importing torch costs seconds: only where it may help
        import torch

        wanted = "cuda" if torch.cuda.is_available() else "cpu"
    return Torch(wanted) if wanted not in (None, "cpu") else Cpu()


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(THREADS, thread_name_prefix="aggregation")


def on_all_cores(work: Callable[[T], None], items: Iterable[T], threads: int = THREADS) -> None:
    """Do `work` for every item, on up to `threads` threads; the first error is raised."""
    queue = list(items)
    if threads <= 1 or len(queue) <= 1:
        for item in queue:
            work(item)
        return

    def share(number: int) -> None:
        for item in queue[number::threads]:
            work(item)

    with nullcontext(_pool()) if threads <= THREADS else ThreadPoolExecutor(threads) as pool:
        for done in [pool.submit(share, number) for number in range(threads)]:
            done.result()
