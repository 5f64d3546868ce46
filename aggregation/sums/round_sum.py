"""One round's sum, fed with whole updates or with pieces of updates that are still arriving.

Records which updates are in the sum, and withdraws those that are refused later.
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
    """The weights of one update: `term` multiplies its tensors in the sum, `share` is added to the divisor."""

    term: float
    share: float


class RoundSum:
    """`sum_i term_i x_i`, with the totals of `term` and `share`: all exact, so the order does not matter."""

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
        """Add whole updates (all tensors, in any order) that fit; each of the others is refused.

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
        """Record that an update is in the sum; `key`: its task, if it was folded on arrival."""
        with self._lock:
            self.share += Fraction(weight.share)
            if key:
                self._taken.add(key)

    def expect(self, key: str, weight: Weight, frame_bytes: int) -> StreamingUpdate:
        """Begin an update that arrives in pieces.

        Raises:
            TooManyTerms: more than was agreed.
        """
        self.total.count(weight.term)
        return StreamingUpdate(self, key, weight, frame_bytes)

    def withdrawal(self, weight: Weight, frame_bytes: int) -> UpdateRollback:
        """Begin to withdraw an update, by feeding its folded bytes again."""
        return UpdateRollback(self.total, weight, frame_bytes)


class _Folding:
    """Cuts a frame into pieces, and adds or subtracts each; parts may be skipped."""

    def __init__(self, total: WeightedSum, term: float, frame_bytes: int, *, back: bool) -> None:
        self.total = total
        self.term = term
        self.fed = 0
        self._back = back
        self._scanner = FrameScanner(frame_bytes)
        self._places: list[int] | None = None
        self.reach: UpdateNorm | None = None
        """Set before the first `feed` to refuse updates beyond a norm bound."""

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
        """Continue at `byte`: the bytes in between belong to another shard."""
        self._scanner.skip(byte - self.fed)
        self.fed = byte

    def wanted_chunks(self, chunk_bytes: int) -> list[int]:
        """The numbers of the chunks that overlap the sum's shard."""
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
        """Why the tensors in the header do not fit the model; None if they do, or before the header is fed."""
        got, expected = self._scanner.specs, self.total.agreement.specs
        if got is None or self._places is not None:
            return None
        refusal = compare(expected, got)
        if refusal is None:
            places = {spec.name: index for index, spec in enumerate(expected)}
            self._places = [places[spec.name] for spec in got]
        return refusal


class UpdateNorm:
    """The L2 distance by which an update in pieces moves the model, and its limit."""

    def __init__(self, base: Sequence[Tensor], limit: float) -> None:
        self._base = [ready(t.dtype, t.data) for t in base]
        self._limit = limit
        self._squares: list[float] = []

    def see(self, index: int, start: int, values: Values) -> None:
        """Take in a piece of tensor `index`, from element `start`."""
        base = self._base[index][start : start + values.size]
        if base.dtype != values.dtype:
            base, values = (read_only(v.astype(np.float64)) for v in (base, values))
        self._squares.append(product_of_gaps(values, base, values, base))

    def refusal(self) -> Refusal | None:
        """The refusal if the limit is exceeded, once all pieces were seen."""
        return beyond(math.sqrt(fsum(self._squares)), self._limit)


def fsum(terms: Sequence[float]) -> float:
    """Exactly rounded; infinite if that overflows."""
    try:
        total = math.fsum(terms)
    except (OverflowError, ValueError):
        return math.inf
    return total if math.isfinite(total) else math.inf


class StreamingUpdate(_Folding):
    """An update that is added to a sum: `feed` its whole frame, then `accept`; or undo it (`withdrawal`).

    After an exception, continue to feed from byte `fed`. After a refusal it must be withdrawn.
    """

    def __init__(self, sum_: RoundSum, key: str, weight: Weight, frame_bytes: int) -> None:
        super().__init__(sum_.total, weight.term, frame_bytes, back=False)
        self._sum = sum_
        self._key = key
        self._frame_bytes = frame_bytes
        self.weight = weight

    def accept(self) -> None:
        """Complete the update, once its whole frame was fed.

        Raises:
            MalformedMessage: the frame is not complete.
        """
        if not self.whole:
            raise MalformedMessage("tensor frame: ends before its last tensor")
        self._sum.take(self.weight, self._key)

    def promise(self) -> None:
        """Record that another process sums the update; its sum is merged later."""
        assert not self.fed
        self._sum.total.discount(self.weight.term)
        self._sum.take(self.weight, self._key)

    def anew(self) -> StreamingUpdate:
        """The same update once more, of one that was promised and was not delivered: it counts already."""
        return self._sum.expect(self._key, Weight(self.weight.term, 0.0), self._frame_bytes)

    def drop(self) -> None:
        """Cancel the update, before any of it was fed."""
        assert not self.fed
        self._sum.total.discount(self.weight.term)

    def withdrawal(self) -> UpdateRollback:
        """A withdrawal of the bytes fed so far."""
        return self._sum.withdrawal(self.weight, self._frame_bytes)


class UpdateRollback(_Folding):
    """Undoes an update: `feed` the same bytes again, cut at the same places, then call `done`."""

    def __init__(self, total: WeightedSum, weight: Weight, frame_bytes: int) -> None:
        super().__init__(total, weight.term, frame_bytes, back=True)

    def feed(self, data: Buffer) -> None:
        """Subtract these bytes. Malformed bytes fail here as they did before: they were never added."""
        with suppress(MalformedMessage):
            super().feed(data)

    def done(self) -> None:
        """Complete the withdrawal."""
        self.total.discount(self.term)


def _in_order(specs: Sequence[TensorSpec], update: Sequence[Tensor]) -> list[Tensor]:
    tensors = {t.name: t for t in update}
    return [tensors[spec.name] for spec in specs]


def _culprit(update: Sequence[Tensor]) -> str:
    return next((t.name for t in update if not is_finite(t)), update[0].name)


def _refusal(fault: Fault, name: str) -> Refusal:
    return Refusal(fault, _REASONS[fault].format(name=name))
