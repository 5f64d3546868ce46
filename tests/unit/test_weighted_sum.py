"""The sum of a round: exact within its bounds, and the same bytes whatever the order, the threads or the tree."""

from __future__ import annotations

import random
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtide.aggregation.sums import weighted_sum
from fedtide.aggregation.sums.agreement import Agreement, ready
from fedtide.aggregation.sums.device import Cpu, Torch
from fedtide.aggregation.sums.fixed_point import COARSE_SHIFT, FixedPoint
from fedtide.aggregation.sums.weighted_sum import BLOCK, TooManyTerms, WeightedSum
from fedtide.fabric.errors import MalformedMessage
from fedtide.fabric.tensors.frame import Tensor, encode
from fedtide.fabric.tensors.scanner import FrameScanner

DTYPES = ("f4", "f8", "f2", "i1", "i4", "i8", "u2", "?")


def _update(rng: np.random.Generator, form: list[tuple[str, tuple[int, ...]]], spread: float = 1.0) -> list[Tensor]:
    arrays = []
    for dtype, shape in form:
        wide = rng.standard_normal(shape) * spread * (10.0 ** rng.integers(-3, 3))
        top = {"f2": 6e4, "i1": 127, "u2": 6e4}.get(dtype, 1e9)
        arrays.append(
            np.asarray(np.clip(wide if dtype.startswith("f") else wide * 10, 0 if dtype == "u2" else -top, top)).astype(
                dtype
            )
        )
    return [Tensor.of(f"t{i}", a) for i, a in enumerate(arrays)]


def _mean(total: WeightedSum) -> list[bytes]:
    return [bytes(t.data) for t in total.mean()]


def _flat(agreement: Agreement, updates: list[list[Tensor]], weights: list[float], threads: int = 1) -> list[bytes]:
    total = WeightedSum(agreement, device=Cpu(), threads=threads)
    assert total.fold_all(updates, weights) == [None] * len(updates)
    return _mean(total)


forms = st.lists(
    st.tuples(st.sampled_from(DTYPES), st.sampled_from([(), (0,), (1,), (7,), (3, 5), (9000,), (20_000,)])),
    min_size=1,
    max_size=4,
)
weight_lists = st.lists(
    st.one_of(st.just(0.0), st.integers(1, 10**6).map(float), st.floats(0.001, 1e6)), min_size=1, max_size=9
).filter(any)


@settings(max_examples=60, deadline=None)
@given(forms, weight_lists, st.integers(0, 2**32), st.sampled_from([1.0, 50.0]))
def test_order_threads_pieces_and_trees_do_not_change_a_byte(
    form: list[tuple[str, tuple[int, ...]]], weights: list[float], seed: int, spread: float
) -> None:
    rng, order = np.random.default_rng(seed), random.Random(seed)
    updates = [_update(rng, form, spread if k == 1 else 1.0) for k in range(len(weights))]
    agreement = Agreement.of(updates[0], max_terms=16)
    expected = _flat(agreement, updates, weights)
    shuffled = order.sample(range(len(weights)), len(weights))
    again = _flat(
        agreement, [updates[i] for i in shuffled], [weights[i] for i in shuffled], threads=order.randint(2, 8)
    )
    assert again == expected
    assert _in_a_tree(agreement, updates, weights, order) == expected
    assert _in_pieces(agreement, updates, weights, order) == expected


def _in_a_tree(
    agreement: Agreement, updates: list[list[Tensor]], weights: list[float], order: random.Random
) -> list[bytes]:
    parts = []
    for update, weight in zip(updates, weights, strict=True):
        leaf = WeightedSum(agreement, device=Cpu())
        leaf.fold_all([update], [weight])
        parts.append(leaf.partial())
    while len(parts) > 1:
        order.shuffle(parts)
        node = WeightedSum(agreement, device=Cpu())
        for part in parts[:3]:
            node.merge(part)
        parts = [*parts[3:], node.partial()]
    root = WeightedSum(agreement, device=Cpu())
    root.merge(parts[0])
    return _mean(root)


def _in_pieces(
    agreement: Agreement, updates: list[list[Tensor]], weights: list[float], order: random.Random
) -> list[bytes]:
    total = WeightedSum(agreement, device=Cpu())
    for update, weight in zip(updates, weights, strict=True):
        total.count(weight)
        frame = b"".join(encode(update))
        scanner = FrameScanner(len(frame))
        while frame:
            cut = order.randint(1, 10_000)
            for piece in scanner.feed(frame[:cut]):
                values = ready(update[piece.index].dtype, piece.data)
                assert total.fold(piece.index, piece.start, [values], [weight]) == [None]
            frame = frame[cut:]
        assert scanner.done
    return _mean(total)


@settings(max_examples=100, deadline=None)
@given(weight_lists, st.integers(0, 2**32))
def test_the_mean_is_the_exact_one_within_the_stated_bound(weights: list[float], seed: int) -> None:
    rng = np.random.default_rng(seed)
    updates = [_update(rng, [("f8", (40,))]) for _ in weights]
    agreement = Agreement.of(updates[0], max_terms=16)
    (found,) = _flat(agreement, updates, weights)
    total = sum(Fraction(w) for w in weights)
    point = agreement.points[0]
    assert point is not None
    for i, value in enumerate(np.frombuffer(found)):
        terms = [Fraction(w) * Fraction(float(u[0].numpy()[i])) for u, w in zip(updates, weights, strict=True)]
        exact = sum(terms)
        coarse = any(abs(t) * Fraction(point.scale) >= point.half - 1 for t in terms)
        unit = Fraction(1 << (COARSE_SHIFT if coarse else 0)) / Fraction(point.scale)
        bound = len(weights) * unit / 2 / total + abs(exact / total) * Fraction(2) ** -50
        assert abs(Fraction(float(value)) - exact / total) <= bound


def test_a_value_far_over_the_model_takes_the_coarse_lane_and_counts() -> None:
    model = [Tensor.of("running_var", np.ones(20_000, np.float32))]
    agreement = Agreement.of(model, max_terms=4)
    huge = np.ones(20_000, np.float32)
    huge[[3, 9000, 19_999]] = 65_025.0 * 100
    total = WeightedSum(agreement, device=Cpu())
    assert total.fold_all([[Tensor.of("running_var", huge)], model], [60_000.0, 60_000.0]) == [None, None]
    (mean,) = total.mean()
    np.testing.assert_allclose(mean.numpy()[[3, 9000, 19_999]], (65_025.0 * 100 + 1) / 2, rtol=1e-6)
    assert mean.numpy()[0] == 1.0


@pytest.mark.parametrize(("value", "fault"), [(np.nan, "not_finite"), (-np.inf, "not_finite"), (3e38, "out_of_range")])
@pytest.mark.parametrize("where", [0, BLOCK - 1, BLOCK + 12_345])
def test_an_update_that_cannot_be_summed_is_taken_back_whole(value: float, fault: str, where: int) -> None:
    rng = np.random.default_rng(5)
    good = [[Tensor.of("w", rng.standard_normal(BLOCK + 20_000).astype("f4"))] for _ in range(5)]
    poisoned = rng.standard_normal(BLOCK + 20_000).astype("f4") * 1e6
    poisoned[where] = value
    agreement = Agreement.of(good[0], max_terms=8)
    total = WeightedSum(agreement, device=Cpu(), threads=2)
    updates = [*good[:2], [Tensor.of("w", poisoned)], *good[2:]]
    assert total.fold_all(updates, [1.0] * 6) == [None, None, fault, None, None, None]
    assert total.terms == total.weight == 5
    assert _mean(total) == _flat(agreement, good, [1.0] * 5)


def test_more_updates_than_were_agreed_on_are_refused_before_anything_is_added() -> None:
    model = [Tensor.of("w", np.ones(10, np.float32))]
    total = WeightedSum(Agreement.of(model, max_terms=2), device=Cpu())
    total.fold_all([model], [1.0])
    with pytest.raises(TooManyTerms, match="2 updates"):
        total.fold_all([model, model], [1.0, 1.0])
    part = WeightedSum(total.agreement, device=Cpu())
    part.fold_all([model, model], [1.0, 1.0])
    with pytest.raises(TooManyTerms):
        total.merge(part.partial())
    assert total.terms == total.weight == 1


def test_no_lane_can_overflow_within_the_agreed_bounds() -> None:
    for terms in (1, 2, 1000, 2048, 2049, 2**24):
        point = FixedPoint.agree(3.0, terms)
        assert point.half * terms <= 2**62


def test_shares_of_the_model_together_are_the_whole() -> None:
    rng = np.random.default_rng(7)
    form = [("f4", (3 * BLOCK + 11,)), ("f4", (5,)), ("f8", (BLOCK,))]
    updates = [_update(rng, form) for _ in range(3)]
    agreement = Agreement.of(updates[0], max_terms=4)
    whole = WeightedSum(agreement, device=Cpu())
    for number in range(3):
        share = WeightedSum(agreement, device=Cpu(), shard=(number, 3))
        share.fold_all(updates, [1.0, 2.0, 3.0])
        part = share.partial()
        whole.merge(part if number == 0 else weighted_sum.Partial(part.tensors, Fraction(0), 0))
    assert _mean(whole) == _flat(agreement, updates, [1.0, 2.0, 3.0])


def test_a_partial_sum_of_another_form_is_refused() -> None:
    model = [Tensor.of("w", np.ones(10, np.float32))]
    total = WeightedSum(Agreement.of(model, max_terms=2), device=Cpu())
    for name, lane in (("1.0.fine", np.zeros(10, np.int64)), ("0.0.fine", np.zeros(9, np.int64)), ("x", np.zeros(1))):
        with pytest.raises(MalformedMessage, match="partial sum"):
            total.merge(weighted_sum.Partial([Tensor.of(name, lane)], Fraction(1), 1))


@settings(max_examples=25, deadline=None)
@given(forms, weight_lists, st.integers(0, 2**32))
def test_torch_gives_the_same_bytes_as_the_cpu_kernels(
    form: list[tuple[str, tuple[int, ...]]], weights: list[float], seed: int
) -> None:
    rng = np.random.default_rng(seed)
    updates = [_update(rng, form, 50.0 if k == 1 else 1.0) for k in range(len(weights))]
    agreement = Agreement.of(updates[0], max_terms=16)
    total = WeightedSum(agreement, device=Torch("cpu"))
    assert total.fold_all(updates, weights) == [None] * len(updates)
    assert _mean(total) == _flat(agreement, updates, weights)


def test_sums_in_float64_are_there_where_they_are_asked_for() -> None:
    model = [Tensor.of("w", np.full(BLOCK + 1, 1e-30))]
    total = WeightedSum(Agreement.of(model, max_terms=2, exact=False), device=Cpu())
    assert total.fold_all([model, [Tensor.of("w", np.full(BLOCK + 1, np.nan))]], [3.0, 1.0]) == [None, "not_finite"]
    (mean,) = total.mean()
    np.testing.assert_allclose(mean.numpy(), 1e-30)
