"""The weighted sum of a round's updates: order-free, piece by piece, in the memory of two models.

Owns the lanes of every tensor, cut into blocks: a piece of an update is folded wherever it lies,
from any thread, and a block is dropped as soon as its mean was taken. Independent of messages
and strategies.

A folded update can be removed exactly, by folding it again with the opposite sign.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, Literal

import numpy as np

from fedtide.aggregation.sums.agreement import Agreement, mean_dtype, ready
from fedtide.aggregation.sums.device import THREADS, Device, Values, choose, on_all_cores
from fedtide.aggregation.sums.fixed_point import COARSE_SHIFT, FixedPoint
from fedtide.aggregation.sums.kernels import mean_of_fine
from fedtide.fabric.errors import FedtideError, MalformedMessage
from fedtide.fabric.tensors.frame import Tensor

BLOCK = 1 << 17
"""Elements of a block: its lane (1 MiB) and four inputs stay in a core's cache."""
_TOGETHER = 4
_SLAB = 16

Fault = Literal["not_finite", "out_of_range"]
_FAULTS: dict[int, Fault | None] = {0: None, 1: "not_finite", 2: "out_of_range"}


class TooManyTerms(FedtideError):
    """More updates than agreed for the sum; nothing was added."""


def _too_many(agreement: Agreement) -> TooManyTerms:
    return TooManyTerms(
        f"more than the {agreement.max_terms} updates that were agreed on for this round", "Agree on more before it"
    )


@dataclass(frozen=True, slots=True)
class Partial:
    """Part of a sum: its lanes by block, the total weight and the number of updates."""

    tensors: list[Tensor]
    weight: Fraction
    terms: int


@dataclass(slots=True, eq=False)
class _Block:
    """A run of one tensor's elements; the coarse lane is there once a term needed it."""

    elements: int
    fine: Any = None
    coarse: Any = None
    mean: Any = None
    """The mean, in place of lanes, if another process summed this block."""
    lock: threading.Lock = field(default_factory=threading.Lock)


class WeightedSum:
    """Sums sum_i w_i x_i per element, and W = sum_i w_i."""

    def __init__(
        self,
        agreement: Agreement,
        *,
        device: Device | None = None,
        threads: int = THREADS,
        shard: tuple[int, int] = (0, 1),
    ) -> None:
        """
        Args:
            shard: (k, n): this is number k of n sums that divide the model's blocks among them.
        """
        self.agreement = agreement
        self.weight = Fraction(0)
        self.terms = 0
        self._device = device or choose()
        self._threads = threads
        sizes = [s.elements for s in agreement.specs]
        self._lock = threading.Lock()
        self._blocks = [[_Block(min(BLOCK, n - low)) for low in range(0, n, BLOCK)] for n in sizes]
        everything = [(i, k) for i, blocks in enumerate(self._blocks) for k in range(len(blocks))]
        number, of = shard
        self._mine = everything[len(everything) * number // of : len(everything) * (number + 1) // of]
        self._is_mine = set(self._mine)

    def count(self, weight: float) -> None:
        """Note a whole update before it is folded.

        Raises:
            TooManyTerms: the agreed number is reached.
        """
        with self._lock:
            if self.terms >= self.agreement.max_terms:
                raise _too_many(self.agreement)
            self.terms += 1
            self.weight += Fraction(weight)

    def discount(self, weight: float) -> None:
        """Undo `count`, for an update that is withdrawn."""
        with self._lock:
            self.terms -= 1
            self.weight -= Fraction(weight)

    def fold(
        self, index: int, start: int, values: Sequence[Values], weights: Sequence[float], *, back: bool = False
    ) -> list[Fault | None]:
        """Add the same run of elements of several updates to tensor `index`, from element `start`; or take it `back`.

        Returns a fault for each input with values that cannot be summed. Such values are left out, also in a
        withdrawal.
        """
        faults: list[Fault | None] = [None] * len(values)
        at = 0
        while at < len(values[0]):
            number, offset = divmod(start + at, BLOCK)
            block = self._blocks[index][number]
            upto = min(len(values[0]), at + block.elements - offset)
            if (index, number) in self._is_mine:
                run = slice(offset, offset + upto - at)
                with block.lock:
                    new = self._fold_block(index, block, run, [v[at:upto] for v in values], weights, -1 if back else 1)
                faults = [old or fault for old, fault in zip(faults, new, strict=True)]
            at = upto
        return faults

    def fold_all(self, updates: Sequence[Sequence[Tensor]], weights: Sequence[float]) -> list[Fault | None]:
        """Add whole updates, on all cores. Those with a fault are taken back: they are not in the sum.

        Raises:
            TooManyTerms: as above; nothing was added.
        """
        if self.terms + len(weights) > self.agreement.max_terms:
            raise _too_many(self.agreement)
        for weight in weights:
            self.count(weight)
        found = self._fold_blocks(updates, weights, 1)
        for update, weight, fault in zip(updates, weights, found, strict=True):
            if fault is not None:
                self.discount(weight)
                self._fold_blocks([update], [weight], -1)
        return found

    def _fold_blocks(
        self, updates: Sequence[Sequence[Tensor]], weights: Sequence[float], sign: int
    ) -> list[Fault | None]:
        found: list[Fault | None] = [None] * len(updates)
        views = [[(t.spec.item_bytes, t.dtype, memoryview(t.data)) for t in update] for update in updates]

        def work(item: tuple[int, int]) -> None:
            index, place = item
            block = self._blocks[index][place]
            for first in range(0, len(updates), _TOGETHER):
                group = views[first : first + _TOGETHER]
                inputs = []
                for update in group:
                    item_bytes, dtype, data = update[index]
                    begin = place * BLOCK * item_bytes
                    inputs.append(ready(dtype, data[begin : begin + block.elements * item_bytes]))
                run = slice(0, block.elements)
                with block.lock:
                    faults = self._fold_block(index, block, run, inputs, weights[first : first + _TOGETHER], sign)
                for k, fault in enumerate(faults):
                    found[first + k] = found[first + k] or fault

        on_all_cores(work, self._mine, self._threads)
        return found

    def _fold_block(
        self, index: int, block: _Block, run: slice, inputs: list[Values], weights: Sequence[float], sign: int
    ) -> list[Fault | None]:
        point, device = self.agreement.points[index], self._device
        if block.fine is None:
            self._make_lanes(index, block)
        lane = block.fine[run]
        if point is None:
            return [self._fold_float(lane, v, sign * w) for v, w in zip(inputs, weights, strict=True)]
        factors = [w * point.scale for w in weights]
        if device.fold(lane, inputs, factors, point.half, sign):
            return [None] * len(inputs)
        if block.coarse is None:
            block.coarse = device.lane(block.elements)
        coarse, unit = block.coarse[run], float(1 << COARSE_SHIFT)
        mended = [
            device.move_overflow_to_coarse(lane, coarse, v, f, point.half, sign, unit)
            for v, f in zip(inputs, factors, strict=True)
        ]
        return [_FAULTS[each] for each in mended]

    def _fold_float(self, lane: Any, values: Values, weight: float) -> Fault | None:
        if not np.isfinite(values).all():
            return "not_finite"
        self._device.fold_float(lane, values, weight)
        return None

    def _make_lanes(self, index: int, block: _Block) -> None:
        """Allocate the lanes of a slab of blocks at once, to get huge pages; freed with the slab's last block."""
        with self._lock:
            if block.fine is not None:
                return
            number = self._blocks[index].index(block)
            slab = self._blocks[index][number - number % _SLAB :][:_SLAB]
            lanes = self._device.lane(sum(b.elements for b in slab), exact=self.agreement.points[index] is not None)
            for place, each in enumerate(slab):
                each.fine = lanes[place * BLOCK : place * BLOCK + each.elements]

    def runs(self, index: int) -> Iterator[tuple[int, int]]:
        """Elements [low, high) of tensor `index` that are in this shard."""
        for owner, number in self._mine:
            if owner == index:
                yield number * BLOCK, number * BLOCK + self._blocks[index][number].elements

    def partial(self) -> Partial:
        """What was summed so far, to be merged into another sum of the same agreement."""
        tensors = [
            Tensor.of(f"{index}.{number}.{name}", self._device.host(lane))
            for index, number in self._mine
            for name in ("fine", "coarse")
            if (lane := getattr(self._blocks[index][number], name)) is not None
        ]
        return Partial(tensors, self.weight, self.terms)

    def merge(self, partial: Partial) -> None:
        """Add the partial sum of another process, made under the same agreement.

        Raises:
            TooManyTerms: together they are more than was agreed; nothing was added.
            MalformedMessage: it is no part of this sum; nothing was added.
        """
        if self.terms + partial.terms > self.agreement.max_terms:
            raise _too_many(self.agreement)
        lanes = [(*self._place_of(tensor), tensor.numpy()) for tensor in partial.tensors]
        for index, block, name, lane in lanes:
            with block.lock:
                if block.fine is None:
                    self._make_lanes(index, block)
                if name == "coarse" and block.coarse is None:
                    block.coarse = self._device.lane(block.elements)
                mine = getattr(block, name)
                mine += self._device.load(lane)
        with self._lock:
            self.terms += partial.terms
            self.weight += partial.weight

    def _place_of(self, tensor: Tensor) -> tuple[int, _Block, str]:
        index, number, name = tensor.name.split(".") if tensor.name.count(".") == 2 else ("", "", "")
        if not (index.isdigit() and number.isdigit() and (int(index), int(number)) in self._is_mine):
            raise MalformedMessage(f"partial sum: {tensor.name!r} is no block of this sum")
        block, point = self._blocks[int(index)][int(number)], self.agreement.points[int(index)]
        dtype = "F64" if point is None else "I64"
        if name not in ("fine", "coarse") or tensor.shape != (block.elements,) or tensor.dtype != dtype:
            raise MalformedMessage(f"partial sum: {tensor.name!r} has another form than its block")
        return int(index), block, name

    def mean_blocks(self) -> Iterator[Tensor]:
        """The weighted mean of this shard, block by block, for the `adopt` of another sum; this one is empty after it.

        Raises:
            ZeroDivisionError: the total weight is 0.
        """
        for index, number in self._mine:
            block = self._blocks[index][number]
            out = np.empty(block.elements, mean_dtype(self.agreement.specs[index].dtype))
            self._mean_of(self.agreement.points[index], block, self._total(), out)
            block.fine = block.coarse = None
            yield Tensor.of(f"{index}.{number}.mean", out)

    def adopt(self, tensors: Sequence[Tensor], weight: Fraction, terms: int) -> None:
        """Take over the means of a shard that another process summed.

        Raises:
            MalformedMessage: they are no blocks of this sum.
        """
        for tensor in tensors:
            place = tensor.name.removesuffix(".mean").split(".")
            block = (
                self._blocks[int(place[0])][int(place[1])] if len(place) == 2 and all(map(str.isdigit, place)) else None
            )
            if block is None or tensor.shape != (block.elements,):
                raise MalformedMessage(f"mean of a shard: {tensor.name!r} is no block of this sum")
            block.mean = tensor.numpy()
        self.weight, self.terms = weight, terms

    def _total(self) -> float:
        total = float(self.weight)
        if not total:
            raise ZeroDivisionError("the total weight is 0")
        return total

    def mean(self) -> Iterator[Tensor]:
        """The weighted mean, tensor by tensor; what was yielded is not kept, and the sum is empty after it.

        Floats keep their dtype (BF16 becomes F32); means of integers and booleans are F64, as in Flower.

        Raises:
            ZeroDivisionError: the total weight is 0.
        """
        total = self._total()
        for index, spec in enumerate(self.agreement.specs):
            out = np.empty(spec.elements, mean_dtype(spec.dtype))
            point = self.agreement.points[index]

            def work(number: int, index: int = index, out: Any = out, point: FixedPoint | None = point) -> None:
                block = self._blocks[index][number]
                self._mean_of(point, block, total, out[number * BLOCK : number * BLOCK + block.elements])
                block.fine = block.coarse = block.mean = None

            on_all_cores(work, range(len(self._blocks[index])), self._threads)
            yield Tensor.of(spec.name, out.reshape(spec.shape))

    def _mean_of(self, point: FixedPoint | None, block: _Block, total: float, out: Any) -> None:
        if block.mean is not None or block.fine is None:
            out[:] = 0.0 if block.mean is None else block.mean
            return
        fine, unit = self._device.host(block.fine), 1.0 / point.scale if point is not None else 1.0
        if block.coarse is None and point is not None and out.dtype != np.float16:
            mean_of_fine(out, fine, unit, total)
            return
        exact = fine.astype(np.float64)
        if block.coarse is not None:
            exact += self._device.host(block.coarse).astype(np.float64) * float(1 << COARSE_SHIFT)
        out[:] = exact * unit / total
