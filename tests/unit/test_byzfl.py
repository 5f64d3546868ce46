"""Our robust rules against byzfl's, in its own environment, on 1,000 random cases with ties."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from benchmarks import byzfl_environment
from benchmarks.byzfl_peer import case
from fedtide.aggregation.strategies.bounded import distances
from fedtide.aggregation.sums.krum_scores import closest, squared_distances
from fedtide.aggregation.sums.order_statistics import median_ranks, middle_mean
from fedtide.fabric.tensors.frame import Tensor

CASES = 1000


@pytest.mark.slow
def test_medians_trimmed_means_krum_and_clipping_are_byzfls(tmp_path: Path) -> None:
    byzfl_environment.run("cases", str(CASES), str(tmp_path / "cases.npz"), folder=tmp_path / "env")
    theirs = np.load(tmp_path / "cases.npz")
    untied = 0
    for seed in range(CASES):
        values, f, radius = case(seed)
        updates = [[Tensor.of("w", v)] for v in values]
        base = [Tensor.of("w", np.zeros(values.shape[1]))]
        count = len(updates)
        found = {
            "median": middle_mean(base, updates, *median_ranks(count))[0].numpy(),
            "trimmed": middle_mean(base, updates, f, count - f)[0].numpy(),
            "clipping": np.mean(
                [
                    v * min(1.0, radius / max(distances(base, u)[0] ** 0.5, 1e-300))
                    for v, u in zip(values, updates, strict=True)
                ],
                axis=0,
            ),
        }
        squares = squared_distances(base, updates)
        scores = np.sort(squares + np.diag(np.full(count, np.inf)), axis=1)[:, : count - f - 1].sum(axis=1)
        if len(np.unique(np.round(scores, 6))) == count:  # among ties byzfl takes any
            untied += 1
            found["multikrum"] = values[closest(squares, count - f - 1, count - f)].mean(axis=0)
        for rule, value in found.items():
            np.testing.assert_allclose(value, theirs[f"{rule}-{seed}"], rtol=1e-9, atol=1e-9, err_msg=f"{rule} {seed}")
    assert untied > CASES / 2
