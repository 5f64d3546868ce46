"""One round's sum as its updates arrive: whole, or in pieces while they are still on their way.

Owns which updates are in the sum, and takes back those that turn out not to belong there.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from fedtide.aggregation.sums.admission import Refusal, beyond, compare, is_finite
from fedtide.aggregation.sums.agreement import Agreement, magnitude, read_only, ready
from fedtide.aggregation.sums.device import Values
from fedtide.aggregation.sums.kernels import product_of_gaps
from fedtide.aggregation.sums.weighted_sum import Fault, WeightedSum
from fedtide.fabric.errors import MalformedMessage
from fedtide.fabric.tensors.frame import Buffer, Tensor, TensorSpec
from fedtide.fabric.tensors.scanner import FrameScanner

_REASONS = {
    "not_finite": "tensor {name!r} holds NaN or infinity",
    "out_of_range": "tensor {name!r} holds values too large to be summed",
}


@dataclass(frozen=True, slots=True)
class Weight:
    """What one update contributes: `term` times its tensors to the sum, `share` to what is divided by."""

    term: float
    share: float


class RoundSum:
    """`sum_i term_i x_i`, with the totals of `term` and `share`: each exact, so no order shows."""

    def __init__(self, agreement: Agreement, *, shard: tuple[int, int] = (0, 1)) -> None:
        self.total = WeightedSum(agreement, shard=shard)
        self.share = Fraction(0)
        self._taken: set[str] = set()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return self.total.terms

    def holds(self, key: str) -> bool:
        """Whether the update of this task was folded while it arrived."""
        return key in self._taken

    def add(self, updates: Sequence[Sequence[Tensor]], weights: Sequence[Weight]) -> list[Refusal | None]:
        """Add whole updates (all tensors, in any order) that fit; the others are refused, each for itself.

        Raises:
            TooManyTerms: more than was agreed; nothing was added.
        """
        specs = self.total.agreement.specs
        refusals = [compare(specs, [t.spec for t in update]) for update in updates]
        fit = [k for k, refusal in enumerate(refusals) if refusal is None]
        ordered = [_in_order(specs, updates[k]) for k in fit]
        faults = self.total.fold_all(ordered, [weights[k].term for k in fit])
        for k, fault in zip(fit, faults, strict=True):
            if fault is None:
                self.take(weights[k])
            else:
                refusals[k] = _refusal(fault, _culprit(ordered[fit.index(k)]))
        return refusals

    def too_large(self, update: Sequence[Tensor], weight: Weight) -> Refusal | None:
        """Why an update of finite values would be refused by `add`, or None."""
        points = {s.name: p for s, p in zip(self.total.agreement.specs, self.total.agreement.points, strict=True)}
        for tensor in update:
            point = points[tensor.name]
            if point is not None and not point.holds(magnitude(tensor) * weight.term):
                return _refusal("out_of_range", tensor.name)
        return None

    def take(self, weight: Weight, key: str = "") -> None:
        """Note that an update is in the sum; `key` if it was folded while it arrived."""
        with self._lock:
            self.share += Fraction(weight.share)
            if key:
                self._taken.add(key)

    def expect(self, key: str, weight: Weight, frame_bytes: int) -> Incoming:
        """An update that comes in pieces.

        Raises:
            TooManyTerms: more than was agreed.
        """
        self.total.count(weight.term)
        return Incoming(self, key, weight, frame_bytes)

    def withdrawal(self, weight: Weight, frame_bytes: int) -> Withdrawal:
        """Takes back an update, from the bytes that were folded."""
        return Withdrawal(self.total, weight, frame_bytes)


class _Folding:
    """Cuts a frame into pieces, and adds or takes back each; parts may be skipped."""

    def __init__(self, total: WeightedSum, term: float, frame_bytes: int, *, back: bool) -> None:
        self.total = total
        self.term = term
        self.fed = 0
        self._back = back
        self._scanner = FrameScanner(frame_bytes)
        self._places: list[int] | None = None
        self.reach: Reach | None = None
        """Set it before anything is fed, to refuse what goes too far."""

    @property
    def specs(self) -> list[TensorSpec] | None:
        """What the frame holds, once its header was fed."""
        return self._scanner.specs

    @property
    def whole(self) -> bool:
        """Whether all of the frame was fed or skipped."""
        return self._scanner.done

    def feed(self, data: Buffer) -> Refusal | None:
        """Fold the next bytes of the frame.

        Raises:
            MalformedMessage: these bytes are no tensor frame.
        """
        self.fed += len(data)
        found: Refusal | None = None
        for piece in self._scanner.feed(data):
            assert self._scanner.specs is not None
            if (refusal := self._misfit()) is not None:
                return refusal
            spec = self._scanner.specs[piece.index]
            assert self._places is not None
            values, index = ready(spec.dtype, piece.data), self._places[piece.index]
            if self.reach is not None:
                self.reach.see(index, piece.start, values)
            (fault,) = self.total.fold(index, piece.start, [values], [self.term], back=self._back)
            if fault is not None and found is None:
                found = _refusal(fault, spec.name)
        found = found or self._misfit()
        return found or (self.reach.refusal() if self.reach is not None and self.whole else None)

    def skip_to(self, byte: int) -> None:
        """The frame goes on at `byte`: what is in between belongs to another shard."""
        self._scanner.skip(byte - self.fed)
        self.fed = byte

    def wanted_chunks(self, chunk_bytes: int) -> list[int]:
        """The numbers of the chunks that hold something of the sum's shard."""
        wanted: set[int] = set()
        at = self._scanner.data_start
        for spec in self._scanner.specs or ():
            index = next((k for k, s in enumerate(self.total.agreement.specs) if s.name == spec.name), None)
            if index is not None:
                for low, high in self.total.runs(index):
                    first, last = at + low * spec.item_bytes, at + min(high, spec.elements) * spec.item_bytes
                    wanted.update(range(first // chunk_bytes, -(-last // chunk_bytes)))
            at += spec.size_bytes
        return sorted(wanted)

    def _misfit(self) -> Refusal | None:
        """Why the tensors that the header names are no update, once it is there."""
        got, expected = self._scanner.specs, self.total.agreement.specs
        if got is None or self._places is not None:
            return None
        refusal = compare(expected, got)
        if refusal is None:
            places = {spec.name: index for index, spec in enumerate(expected)}
            self._places = [places[spec.name] for spec in got]
        return refusal


class Reach:
    """How far an update that comes in pieces moves the model, and how far it may."""

    def __init__(self, base: Sequence[Tensor], limit: float) -> None:
        self._base = [ready(t.dtype, t.data) for t in base]
        self._limit = limit
        self._squares: list[float] = []

    def see(self, index: int, start: int, values: Values) -> None:
        """A piece of tensor `index`, from element `start`."""
        base = self._base[index][start : start + values.size]
        if base.dtype != values.dtype:
            base, values = (read_only(v.astype(np.float64)) for v in (base, values))
        self._squares.append(product_of_gaps(values, base, values, base))

    def refusal(self) -> Refusal | None:
        """Once all was seen."""
        return beyond(math.sqrt(fsum(self._squares)), self._limit)


def fsum(terms: Sequence[float]) -> float:
    """Exactly rounded; infinite if that overflows."""
    try:
        total = math.fsum(terms)
    except (OverflowError, ValueError):
        return math.inf
    return total if math.isfinite(total) else math.inf


class Incoming(_Folding):
    """An update on its way into a sum: `feed` it all of its frame, then `accept`; or take it back (`withdrawal`).

    An exception in between leaves it where it was: feed it on from `fed` bytes. After a refusal it must be
    withdrawn.
    """

    def __init__(self, sum_: RoundSum, key: str, weight: Weight, frame_bytes: int) -> None:
        super().__init__(sum_.total, weight.term, frame_bytes, back=False)
        self._sum = sum_
        self._key = key
        self._frame_bytes = frame_bytes
        self.weight = weight

    def accept(self) -> None:
        """All of it is in the sum.

        Raises:
            MalformedMessage: it is not.
        """
        if not self.whole:
            raise MalformedMessage("tensor frame: ends before its last tensor")
        self._sum.take(self.weight, self._key)

    def promise(self) -> None:
        """Another sums it, and that sum will be merged."""
        assert not self.fed
        self._sum.total.discount(self.weight.term)
        self._sum.take(self.weight, self._key)

    def drop(self) -> None:
        """It will not come."""
        assert not self.fed
        self._sum.total.discount(self.weight.term)

    def withdrawal(self) -> Withdrawal:
        """Takes back what was fed."""
        return self._sum.withdrawal(self.weight, self._frame_bytes)


class Withdrawal(_Folding):
    """`feed` it all that was fed, in the same cuts; then it is `done`."""

    def __init__(self, total: WeightedSum, weight: Weight, frame_bytes: int) -> None:
        super().__init__(total, weight.term, frame_bytes, back=True)

    def feed(self, data: Buffer) -> None:
        """Take these bytes back. Where they made no sense they make none now: nothing of that was added."""
        with suppress(MalformedMessage):
            super().feed(data)

    def done(self) -> None:
        """Nothing of it is in the sum."""
        self.total.discount(self.term)


def _in_order(specs: Sequence[TensorSpec], update: Sequence[Tensor]) -> list[Tensor]:
    tensors = {t.name: t for t in update}
    return [tensors[spec.name] for spec in specs]


def _culprit(update: Sequence[Tensor]) -> str:
    return next((t.name for t in update if not is_finite(t)), update[0].name)


def _refusal(fault: Fault, name: str) -> Refusal:
    return Refusal(fault, _REASONS[fault].format(name=name))
