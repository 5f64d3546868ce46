"""Each case runs on Flower's own loop and here; what the app wrote down must be the same, byte for byte."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.conftest import APPS
from tests.integration.installation import Installation

APP = APPS / "referee"
NODES = ("eu-1", "eu-2", "us-1", "us-2")
Reference = Callable[[dict[str, Any]], Any]


@pytest.fixture(scope="module")
def reference() -> Iterator[Reference]:
    """Flower's own loop, in one process for all cases."""
    command = [sys.executable, "-m", "tests.fidelity.reference", str(APP), *NODES]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None and process.stdout is not None
        stdin, stdout = process.stdin, process.stdout

        def trace(config: dict[str, Any]) -> Any:
            stdin.write(json.dumps(config) + "\n")
            stdin.flush()
            return json.loads(stdout.readline())

        yield trace
        stdin.close()


def here(there: Installation, config: dict[str, Any]) -> Any:
    settings = [word for key, value in config.items() for word in ("--set", f"{key}={value}")]
    view = there.train(APP, *settings)
    return json.loads((there.out(view.run) / "trace.json").read_text())


def config_of(case: str, **options: Any) -> dict[str, Any]:
    return {"case": case, "options": json.dumps(options)}


DP = {"noise_multiplier": 0.5, "num_sampled_clients": 4}
ADAPTIVE = {**DP, "clipped_count_stddev": 0.5}
CASES = {
    **{
        name: config_of(name)
        for name in ("FedAvg", "FedAvgM", "FedAdagrad", "FedAdam", "FedYogi", "FedMedian", "FedTrimmedAvg")
    },
    "FedProx": config_of("FedProx", kwargs={"proximal_mu": 0.1}),
    "QFedAvg": config_of("QFedAvg", kwargs={"client_learning_rate": 0.1, "q": 0.2}, dtypes=["float32"]),
    "Krum": config_of("Krum", kwargs={"num_malicious_nodes": 1}, dtypes=["float32"]),
    "MultiKrum": config_of(
        "MultiKrum", kwargs={"num_malicious_nodes": 1, "num_nodes_to_select": 2}, dtypes=["float32"]
    ),
    "Bulyan": config_of("Bulyan", kwargs={"num_malicious_nodes": 0}, dtypes=["float32"]),
    "FedXgbBagging": config_of("FedXgbBagging", booster=True),
    "FedXgbCyclic": config_of("FedXgbCyclic", booster=True, alone=True),
    "server DP": config_of(
        "FedAvg+DifferentialPrivacyServerSideFixedClipping", dp={**DP, "clipping_norm": 1.0}, dtypes=["float32"]
    ),
    "server DP, adaptive": config_of(
        "FedAvg+DifferentialPrivacyServerSideAdaptiveClipping", dp=ADAPTIVE, dtypes=["float32"]
    ),
    "client DP": config_of(
        "FedAvg+DifferentialPrivacyClientSideFixedClipping",
        dp={**DP, "clipping_norm": 1.0},
        mods="fixed",
        dtypes=["float32"],
    ),
    "client DP, adaptive": config_of(
        "FedAvg+DifferentialPrivacyClientSideAdaptiveClipping", dp=ADAPTIVE, mods="adaptive", dtypes=["float32"]
    ),
    "mods of sizes": config_of("FedAvg", mods="sizes"),
    "central evaluation": config_of("FedAvg", central=True, lists=True),
    "evaluation only": config_of("FedAvg", kwargs={"fraction_train": 0.0, "min_train_nodes": 0}, central=True),
    "no evaluation": config_of("FedAvg", kwargs={"fraction_evaluate": 0.0, "min_evaluate_nodes": 0}),
    "neither": config_of(
        "FedAvg",
        kwargs={"fraction_train": 0.0, "fraction_evaluate": 0.0, "min_train_nodes": 0, "min_evaluate_nodes": 0},
    ),
    "dtypes": config_of("FedAvg", dtypes=["float16", "float32", "float64", "int8", "int32", "uint8", "int64"]),
    "partial updates": config_of("FedAvg", only=["t0"]),
    "empty initial arrays": config_of("FedAvg", empty=True, initialises=True),
    "an infinite mask": config_of("FedAvg", infinite=True, dtypes=["float32"]),
    "a node that raises": config_of("FedAvg", raises=[2]),
    "only one counts": config_of("FedAvg", examples=[0, 0, 5, 0]),
    "two strategies": config_of("FedAvg,FedAdam", dtypes=["float32"]),
    "overridden": config_of("Saving"),
    "an action": config_of("Warmup", dtypes=["float32"]),
    "two messages to a node": config_of("Twice"),
    "asks beside its phase": config_of("Asking"),
    "a copied method": config_of("Copied", dtypes=["float32"]),
    "arrays of any length": config_of("Stacking", ragged=True),
    "the app's own error": config_of("Broken"),
    "asks": config_of("asks"),
    "pushes": config_of("pushes"),
    "wrapped": config_of("wrapped"),
}


FAILS = ("the app's own error",)


LIKE_OTHERS = (
    *("FedAvgM", "FedAdagrad", "FedYogi", "FedTrimmedAvg", "FedProx", "MultiKrum", "Bulyan"),
    *("client DP", "mods of sizes", "no evaluation", "neither", "only one counts"),
)


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=pytest.mark.slow) if case in LIKE_OTHERS else case for case in CASES]
)
def test_an_app_does_the_same_on_flower_and_here(installation: Installation, reference: Reference, case: str) -> None:
    found = reference(CASES[case])
    assert ("exception" in found) == (case in FAILS), found.get("exception")
    assert here(installation, CASES[case]) == found


PLANS = st.fixed_dictionaries(
    {
        "dtypes": st.lists(st.sampled_from(["float16", "float32", "float64", "int16", "int64", "uint8"]), max_size=4),
        "examples": st.lists(st.integers(1, 1000), min_size=4, max_size=4),
        "evaluated": st.lists(st.integers(1, 1000), min_size=4, max_size=4),
        "raises": st.lists(st.sampled_from([0, 1, 2]), max_size=2, unique=True),
        "central": st.booleans(),
        "lists": st.booleans(),
        "infinite": st.booleans(),
    }
)
STRATEGIES = st.sampled_from(
    ["FedAvg", "FedMedian", "FedAvgM", "FedAdam", "FedAvg,FedMedian", "Saving", "Asking", "asks"]
)


def _same_for_any(installation: Installation, reference: Reference, examples: int) -> None:
    @settings(max_examples=examples, deadline=None, database=None, derandomize=True)
    @given(case=STRATEGIES, plan=PLANS)
    def same(case: str, plan: dict[str, Any]) -> None:
        config = config_of(case, **plan)
        assert here(installation, config) == reference(config)

    same()


def test_generated_apps_do_the_same(installation: Installation, reference: Reference) -> None:
    _same_for_any(installation, reference, 6)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_many_generated_apps_do_the_same(installation: Installation, reference: Reference) -> None:
    _same_for_any(installation, reference, 150)
