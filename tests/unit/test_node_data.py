"""What a node keeps of its requests, what it makes of it, and what leaves it: nothing but counts."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtide.edge_agent.comparison.comparison import Comparison
from fedtide.edge_agent.drift.sketch import BINS, MAX_FEATURES, Sketch, psi, scores, total
from fedtide.edge_agent.samples.source import CapturedSamples
from fedtide.edge_agent.samples.store import Sample, SampleStore
from fedtide.edge_agent.serving.scoring import predictions, same, targets
from fedtide.edge_agent.serving.serving import Served
from fedtide.fabric.errors import NotFound, RemoteError
from fedtide.fabric.plans.release import Export, Scoring
from fedtide.fabric.plans.rollout_plan import Desired, Measured, Terms
from tests.served import model


def _sample(key: str, at: float = 0.0, value: float = 1.0, name: str = "scale") -> Sample:
    return Sample(name, key, at, {"x": np.full((1, 3), value, np.float32)})


def _store(folder: Path, max_bytes: int = 10**9, max_age_s: float = 1e12) -> SampleStore:
    return SampleStore(folder / "s.sqlite", max_bytes, max_age_s)


# Samples


def test_a_label_that_comes_later_finds_its_sample(tmp_path: Path) -> None:
    store = _store(tmp_path)
    store.add([_sample("a", 1.0), _sample("b", 2.0)], 2.0)
    assert store.label("scale", {"b": 7, "stranger": 1}, 3.0) == 1
    (found,) = store.labelled("scale", 10)
    assert (found.id, found.label, found.inputs["x"].tolist()) == ("b", 7, [[1, 1, 1]])
    assert store.labelled("scale", 10, since=3.0) == []
    assert store.counts() == {"scale": {"samples": 2, "labelled": 1, "bytes": pytest.approx(200, abs=150)}}


def test_old_samples_go_by_age_and_by_size_the_oldest_first(tmp_path: Path) -> None:
    store = _store(tmp_path, max_age_s=100)
    store.add([_sample("old", 0.0), _sample("new", 150.0)], 200.0)
    assert store.counts()["scale"]["samples"] == 1
    small = _store(tmp_path / "small", max_bytes=2000)
    small.add([_sample(str(n), float(n)) for n in range(100)], 100.0)
    left = small.counts()["scale"]
    assert left["bytes"] <= 2000
    small.label("scale", {"99": 1, "0": 1}, 100.0)
    assert [s.id for s in small.labelled("scale", 10)] == ["99"]


def test_a_clock_that_jumps_deletes_no_sample_and_dates_none_before_another(tmp_path: Path) -> None:
    store, year = _store(tmp_path, max_age_s=100), 3e7
    store.add([_sample("a", 1000.0)], 1000.0)
    store.add([_sample("ahead", 1000.0 + year)], 1000.0 + year, is_sure=False)
    assert store.counts()["scale"]["samples"] == 2
    store.add([_sample("b", 1010.0)], 1010.0)  # the coordinator has told the time
    store.add([_sample("behind", 0.0)], 0.0, is_sure=False)
    store.add([_sample("c", 1050.0)], 1050.0)
    assert store.counts()["scale"]["samples"] == 5
    store.add([_sample("d", 1105.0)], 1105.0)
    assert store.counts()["scale"]["samples"] == 5, "a is too old now, and nothing else"


def test_samples_are_forgotten_on_request_down_to_the_bytes_on_the_disk(tmp_path: Path) -> None:
    store = _store(tmp_path)
    secret = Sample("scale", "s", 0.0, {"x": np.frombuffer(b"A-VERY-SECRET-12", np.uint8)[None, :]})
    store.add([secret, _sample("b", 5.0), _sample("c", 9.0)], 9.0)
    assert b"A-VERY-SECRET-12" in b"".join(p.read_bytes() for p in tmp_path.iterdir())
    assert store.forget("scale", id_="s") == 1
    assert b"A-VERY-SECRET-12" not in b"".join(p.read_bytes() for p in tmp_path.iterdir())
    assert store.forget("scale", before=6.0) == 1
    assert store.forget("scale") == 1


def test_a_damaged_store_is_put_aside_and_begun_anew(tmp_path: Path) -> None:
    (tmp_path / "s.sqlite").write_bytes(b"this is no database, whatever it was" * 100)
    store = _store(tmp_path)
    store.add([_sample("a")], 1.0)
    assert store.counts()["scale"]["samples"] == 1
    assert (tmp_path / "s.damaged").exists()


def test_an_app_reads_captured_samples_as_columns(tmp_path: Path) -> None:
    store = _store(tmp_path)
    store.add([_sample(str(n), float(n), float(n)) for n in range(5)], 9.0)
    store.label("scale", {str(n): n for n in (1, 3)}, 9.0)
    source = CapturedSamples.open(str(tmp_path / "s.sqlite"), "scale")
    assert len(source) == 2
    columns = source.read([1, 0])
    assert columns["x"][:, 0].tolist() == [3, 1]
    assert columns["label"].tolist() == [3, 1]
    with pytest.raises(NotFound, match=r"capture\.share"):
        CapturedSamples.open(str(tmp_path / "nowhere"), "scale")


# Scoring


def test_answers_are_read_as_the_manifest_says() -> None:
    logits = {"y": np.array([[0.1, 0.9], [3.0, 1.0]], np.float32)}
    assert predictions(Scoring(), logits).tolist() == [1, 0]
    assert predictions(Scoring(rule="threshold", at=0.5), {"p": np.array([0.4, 0.5])}).tolist() == [0, 1]
    value = Scoring(rule="value", at=0.1)
    assert same(value, predictions(value, {"v": np.array([1.0, 2.0])}), np.array([1.05, 2.5])).tolist() == [True, False]
    assert targets(Export(labels=["cat", "dog"]), "dog", 1).tolist() == [1]
    for label, rows in (("bird", 1), ([1, 2], 3)):
        with pytest.raises(RemoteError):
            targets(Export(labels=["cat"]), label, rows)
    with pytest.raises(RemoteError, match="no output"):
        predictions(Scoring(output="z"), logits)


async def _measured(tmp_path: Path, terms: Terms, *served: float, labels: bool = True) -> Measured:
    """What a node reports of a candidate that triples against an incumbent that doubles."""
    scoring = Export(scoring=Scoring(rule="value", at=0.1))
    candidate, incumbent = model(tmp_path, 3, export=scoring), model(tmp_path, 2, export=scoring)
    store = _store(tmp_path)
    store.add([_sample(str(n), float(n), float(n)) for n in range(10)], 9.0)
    if labels:
        store.label("scale", {str(n): (2.0 if n < 7 else 3.0) * n for n in range(1, 10)} | {"0": 0.0}, 9.0)
    reports: asyncio.Queue[Measured] = asyncio.Queue()

    async def report(_: Desired, measured: Measured) -> None:
        reports.put_nowait(measured)

    desired = Desired(model="scale", counter=1, rollout="ro-1", release=candidate.release, terms=terms)
    comparison = Comparison(desired, candidate, incumbent, store, report)
    task = asyncio.create_task(comparison.run())
    last = await reports.get()
    for value in served:
        inputs = {"x": np.full((1, 3), value, np.float32)}
        outputs = candidate.run(candidate.prepare(inputs))
        comparison.observe(Served(candidate, "", inputs, inputs, outputs, 0.001))
    while served and last.shadowed < len(served) * (terms.shadow > 0):
        last = await reports.get()
        comparison._changed.set()
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    return comparison.measured


async def test_paired_scores_are_wins_losses_and_ties_of_the_nodes_own_samples(tmp_path: Path) -> None:
    counts = await _measured(tmp_path, Terms(holdout=100, report_s=0.01))
    assert (counts.wins, counts.losses, counts.ties) == (3, 6, 1)
    assert (await _measured(tmp_path, Terms(holdout=4, report_s=0.01))).losses + 0 <= 4


async def test_shadow_inference_counts_disagreement(tmp_path: Path) -> None:
    counts = await _measured(tmp_path, Terms(shadow=1.0, report_s=0.01), 0.0, 1.0, 2.0)
    assert (counts.inferences, counts.shadowed, counts.disagreed) == (3, 3, 2)
    assert counts.latency_ms == pytest.approx(3.0)


async def test_a_failure_counts_only_if_the_incumbent_answers_the_same_request(tmp_path: Path) -> None:
    candidate, incumbent = model(tmp_path, 3), model(tmp_path, 2)
    desired = Desired(model="scale", counter=1, rollout="ro-1", release=candidate.release, terms=Terms(report_s=0.01))
    reports: asyncio.Queue[Measured] = asyncio.Queue()

    async def report(_: Desired, measured: Measured) -> None:
        reports.put_nowait(measured)

    comparison = Comparison(desired, candidate, incumbent, _store(tmp_path), report)
    task = asyncio.create_task(comparison.run())
    # A missing reading; a number too large for both; one that only the candidate makes infinite.
    for value in (np.nan, 3e38, 1.5e38):
        inputs = {"x": np.full((1, 3), value, np.float32)}
        with np.errstate(all="ignore"):
            comparison.observe(Served(candidate, "", inputs, inputs, candidate.run(candidate.prepare(inputs)), 0.001))
    async with asyncio.timeout(20):
        while (await reports.get()).errors < 1:
            pass
    assert (comparison.measured.errors, comparison.measured.inferences) == (1, 0)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    alone = Comparison(desired, candidate, None, _store(tmp_path), report)
    for value in (np.nan, 3e38):
        inputs = {"x": np.full((1, 3), value, np.float32)}
        alone.observe(Served(candidate, "", inputs, inputs, None, 0.001))
    assert alone.measured.errors == 1, "the one whose request is finite"


# Drift


def _saw(rng: Any, n: int, shift: float = 0.0, features: int = 3) -> Sketch:
    sketch = Sketch()
    rows = rng.normal(shift, 1.0, (n, features)).astype(np.float32)
    sketch.add({"x": rows}, {"y": np.stack([rows[:, 0], -rows[:, 0]], 1)}, Scoring())
    return sketch


def test_the_index_is_near_zero_without_drift_and_large_with_it() -> None:
    rng = np.random.default_rng(5)
    before = _saw(rng, 2000)
    calm, moved = scores(_saw(rng, 1000), before), scores(_saw(rng, 1000, 1.0), before)
    assert max(calm.values()) < 0.05
    assert moved["x[0]"] > 0.5
    assert moved["prediction"] > 0.2


def test_a_sum_of_sketches_is_the_sketch_of_all_and_leaves_out_what_not_all_have() -> None:
    rng = np.random.default_rng(6)
    rows = rng.normal(0, 3, (300, 2))
    whole, parts = Sketch(), []
    whole.add({"x": rows}, {}, Scoring())
    for part in np.array_split(rows, 3):
        parts.append(Sketch())
        parts[-1].add({"x": part}, {}, Scoring())
    parts[0].histograms["odd"] = np.ones(BINS, np.int64)
    summed = total(parts)
    assert summed.samples == 300
    assert set(summed.histograms) == set(whole.histograms)
    for name, histogram in whole.histograms.items():
        np.testing.assert_array_equal(summed.histograms[name], histogram)


@settings(max_examples=30)
@given(st.integers(1, 5000), st.integers(1, 50))
def test_a_sketch_takes_the_same_memory_whatever_it_saw(features: int, rows: int) -> None:
    sketch = Sketch()
    values = np.full((rows, features), np.inf)
    values[:, ::2] = np.nan
    sketch.add({"x": values}, {"y": values[:, :2]}, Scoring())
    assert sum(h.size for h in sketch.histograms.values()) <= (MAX_FEATURES + 2) * BINS


def test_the_index_of_nothing_is_zero() -> None:
    empty = np.zeros(BINS, np.int64)
    assert psi(empty, empty) == 0
    assert psi(empty + 1, empty) == 0
