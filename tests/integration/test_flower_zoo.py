"""flwr's stock strategies and workflows, with clients that answer as real ones do."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.conftest import APPS
from tests.integration.installation import Installation


def _result(there: Installation, case: str) -> Any:
    view = there.train(APPS / "zoo", "--set", f"case={case}")
    assert view.state == "completed", view.reason
    refused = [t.refused for r in view.rounds for t in r.phases.values() if t.refused]
    assert refused == []
    return json.loads((there.out(view.run) / "result.json").read_text())


@pytest.mark.parametrize(
    "strategy",
    ["FedAvg", "Krum", "dp", *(pytest.param(s, marks=pytest.mark.slow) for s in ("FedAdam", "FedMedian", "Partial"))],
)
def test_a_stock_strategy_accepts_every_update_in_every_round(installation: Installation, strategy: str) -> None:
    result = _result(installation, strategy)
    assert result["rounds"] == 3
    expected = {"FedAvg": 3.0, "FedMedian": 3.0, "Krum": 3.0, "Partial": 3.0}
    if strategy in expected:
        assert result["w"] == [expected[strategy]] * 8


def test_large_values_odd_dtypes_and_several_array_records_pass_both_ways(installation: Installation) -> None:
    assert _result(installation, "queries") == {
        "replies": 4,
        "again": 4,
        "large": True,
        "echo": True,
        "complex": True,
        "strings": ["ä", "bc"],
        "empty": [0, 2],
    }


def test_flowers_secure_aggregation_workflow_gives_the_mean(installation: Installation) -> None:
    result = _result(installation, "secagg")
    assert result["mean"] == pytest.approx(2.0, abs=1e-3)
    assert result["spread"] < 1e-2
