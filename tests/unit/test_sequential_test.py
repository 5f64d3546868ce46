"""The sequential test: valid however often one looks, and quick when there is something to see."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedtide.coordinator.rollouts.sequential_test import Verdict, judge


def _until_decided(values: list[float], bound: float, alpha: float, every: int = 20) -> Verdict:
    counts: dict[float, int] = {}
    verdict = judge(counts, bound, -1.0, 1.0, alpha)
    for number, value in enumerate(values, start=1):
        counts[value] = counts.get(value, 0) + 1
        if number % every == 0:
            verdict = judge(counts, bound, -1.0, 1.0, alpha)
            if verdict.above or verdict.below:
                break
    return verdict


def _samples(rng: random.Random, win: float, loss: float, n: int) -> list[float]:
    return rng.choices([1.0, -1.0, 0.0], [win, loss, 1 - win - loss], k=n)


@pytest.mark.parametrize(("win", "loss"), [(0.0, 0.02), (0.1, 0.12), (0.3, 0.32)])
def test_at_the_bound_it_is_wrong_no_more_often_than_alpha_though_one_looks_all_the_time(
    win: float, loss: float
) -> None:
    rng, alpha = random.Random(7), 0.1
    verdicts = [_until_decided(_samples(rng, win, loss, 2000), -0.02, alpha) for _ in range(100)]
    assert sum(v.above for v in verdicts) <= 18
    assert sum(v.below for v in verdicts) <= 18


def test_a_model_that_fails_on_a_twentieth_is_found_within_a_few_hundred_samples() -> None:
    rng = random.Random(1)
    verdicts = [_until_decided(_samples(rng, 0.0, 0.05, 3000), -0.02, 0.01) for _ in range(50)]
    assert all(v.below for v in verdicts)
    assert sum(v.n for v in verdicts) / 50 < 700


def test_an_equal_model_passes_within_a_few_hundred_samples() -> None:
    assert judge({0.0: 400}, -0.02, -1.0, 1.0, 0.01).above


def test_without_evidence_it_says_about_how_much_is_missing() -> None:
    rng = random.Random(3)
    samples = _samples(rng, 0.0, 0.06, 4000)
    early = judge({v: samples[:150].count(v) for v in (0.0, -1.0)}, -0.02, -1.0, 1.0, 0.001)
    assert not early.above
    assert not early.below
    decided = _until_decided(samples, -0.02, 0.001)
    assert 0 < early.more < 10 * decided.n
    assert judge({0.0: 1}, 5e-324, -1.0, 1.0, 0.25).more == 10
    assert judge({}, 0.0, -1.0, 1.0, 0.01) == Verdict(False, False, 0.0, 0, 1)


@given(st.lists(st.sampled_from([1.0, 0.0, -1.0]), max_size=300), st.floats(-0.5, 0.5), st.floats(0.001, 0.4))
def test_it_never_says_both_and_only_what_the_mean_says(values: list[float], bound: float, alpha: float) -> None:
    counts = {v: values.count(v) for v in (1.0, 0.0, -1.0)}
    verdict = judge(counts, bound, -1.0, 1.0, alpha)
    assert not (verdict.above and verdict.below)
    if verdict.above:
        assert verdict.mean > bound
    if verdict.below:
        assert verdict.mean < bound
    assert math.isclose(verdict.mean, sum(values) / max(1, len(values)), abs_tol=1e-9)
