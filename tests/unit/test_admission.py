"""What may be averaged: names, dtypes, shapes, finite numbers."""

from __future__ import annotations

import numpy as np
import pytest

from fedtide.aggregation.sums.admission import inspect, is_finite
from fedtide.fabric.tensors.frame import Tensor


def _update(**arrays: np.ndarray) -> list[Tensor]:
    return [Tensor.of(k, v) for k, v in arrays.items()]


SENT = _update(w=np.zeros((2, 3), np.float32), b=np.zeros((), np.float64))


def test_an_update_of_the_same_form_is_admitted_in_any_order() -> None:
    assert inspect(SENT, _update(b=np.ones((), np.float64), w=np.ones((2, 3), np.float32))) is None


@pytest.mark.parametrize(
    ("update", "category", "words"),
    [
        (_update(w=np.zeros((2, 3), np.float32)), "wrong_shape", "'b' is missing"),
        ([*SENT, *_update(x=np.zeros(1))], "wrong_shape", "'x' was not asked for"),
        (_update(w=np.zeros((3, 2), np.float32), b=np.zeros(())), "wrong_shape", r"shape \(3, 2\)"),
        (_update(w=np.full((2, 3), np.nan, np.float32), b=np.zeros(())), "not_finite", "'w'"),
        (_update(w=np.zeros((2, 3), np.float32), b=np.array(np.inf)), "not_finite", "'b'"),
    ],
)
def test_what_does_not_fit_is_refused_with_its_category(update: list[Tensor], category: str, words: str) -> None:
    refusal = inspect(SENT, update)
    assert refusal is not None
    assert refusal.category == category
    with pytest.raises(AssertionError, match=words):
        raise AssertionError(refusal.reason)


def test_opposite_infinities_do_not_hide_each_other() -> None:
    assert not is_finite(Tensor.of("a", np.array([np.inf, -np.inf], np.float32)))


def test_large_finite_numbers_are_finite_though_their_sum_is_not() -> None:
    assert is_finite(Tensor.of("a", np.full(4, np.finfo(np.float64).max)))
    assert is_finite(Tensor.of("a", np.full(4, np.finfo(np.float32).max, np.float32)))


def test_integers_and_empty_tensors_are_finite() -> None:
    assert is_finite(Tensor.of("a", np.array([2**62], np.int64)))
    assert is_finite(Tensor.of("a", np.zeros(0, np.float32)))


def test_precision_is_no_ground_for_refusal() -> None:
    assert inspect(SENT, _update(w=np.zeros((2, 3), np.float16), b=np.zeros((), np.int64))) is None
