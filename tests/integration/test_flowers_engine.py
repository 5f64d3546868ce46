"""Our strategies and mods under Flower's own Grid: a real SuperLink with real SuperNodes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.bench_round_overhead import BIN, superlink
from tests.conftest import APPS
from tests.integration.installation import until
from tests.integration.test_sums import NODES, _by_hand, _mean, _median, _middle


@pytest.mark.slow
def test_strategies_give_the_same_under_flowers_own_grid(tmp_path: Path) -> None:
    everyone = {"min_available_nodes": NODES, "min_train_nodes": NODES}
    rules: dict[str, tuple[dict[str, int], Any]] = {
        "FedAvg": (everyone, _mean),
        "CoordinateMedian": (everyone, _median),
        "StreamingTrimmedMean": ({**everyone, "num_malicious_nodes": 1}, _middle),
    }
    shutil.copytree(APPS / "sums", tmp_path / "sums")
    with superlink(tmp_path) as (environment, _):
        environment["PYTHONPATH"] = os.getcwd()
        for strategy, (options, rule) in rules.items():
            out = tmp_path / strategy
            config = f"strategy='{strategy}' options='{json.dumps(options)}' out='{out}-'"
            command = [str(BIN / "flwr"), "run", str(tmp_path / "sums"), "bench", "--run-config", config]
            done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
            assert done.returncode == 0, done.stderr
            final = Path(f"{out}-final.npz")
            until(lambda final=final: final.exists() and final.stat().st_size > 1000, strategy, timeout_s=180)
            expected = _by_hand(rule, list(range(NODES)))
            until(lambda final=final: _opens(final), "a whole file")
            with np.load(final) as model:
                np.testing.assert_allclose(model["w"], expected["w"], rtol=1e-5, atol=2e-6)


def _opens(file: Path) -> bool:
    try:
        with np.load(file) as model:
            return "n" in model.files
    except (OSError, ValueError, zipfile.BadZipFile):
        return False
