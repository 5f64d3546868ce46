"""What OpenCost says of the pods of runs, beside what the ledger says of their processes."""

from __future__ import annotations

import json
from decimal import Decimal
from typing import Any

import pytest

from fedtide.console import opencost
from fedtide.fabric.errors import ConfigError
from fedtide.fabric.messages.cost_views import CostRow

WINDOW = {"start": "2026-11-01T00:00:00Z", "end": "2026-11-08T00:00:00Z"}


def allocation(name: str, cost: float, label: str = "", **more: Any) -> dict[str, Any]:
    labels = {"labels": {"fedtide_dev_run": label}} if label else {}
    about = {"cluster": "cluster-one", "namespace": "fedtide", **labels}
    return {"name": name, "properties": about, "window": WINDOW, "totalCost": cost, "cpuEfficiency": 0.2, **more}


def row(run: str, cost: str, **quantities: int) -> CostRow:
    zero = Decimal(0)
    return CostRow(
        group={"run": run},
        cost=Decimal(cost),
        list_cost=zero,
        wasted=zero,
        wan_saved=zero,
        quantities=quantities,
        per={},
        lines=1,
    )


def test_pods_are_laid_beside_what_their_processes_used() -> None:
    answer = {
        "code": 200,
        "data": [
            {
                "run-1": allocation("run-1", 3.0, cpuCoreHours=4.0, ramByteHours=8e9),
                "__unallocated__": allocation("__unallocated__", 9.5, cpuCoreHours=20.0),
            },
            {"fedtide/pod-x": allocation("fedtide/pod-x", 1.0, label="run-1", cpuCoreHours=2.0, gpuHours=1.0)},
            None,
            {"x": {**allocation("__idle__", 0.5), "properties": None}},
        ],
    }
    found = opencost.read(json.dumps(answer), "a.json")
    assert (found.until - found.since).days == 7
    rows = [row("run-1", "2.5", cpu=3 * 3_600_000_000, memory=4 * 3_600_000_000), row("run-2", "0.1", cpu=1)]
    compared = {each.run: each for each in opencost.compared(rows, found)}
    assert list(compared) == ["no run", "run-1", "run-2"], "those that differ most come first"
    both = compared["run-1"]
    assert (both.ledger, both.opencost, both.difference) == (Decimal("2.5"), Decimal(4), Decimal("1.5"))
    assert [list(map(float, both.hours[meter])) for meter in ("cpu", "memory", "gpu")] == [[3, 6], [4, 8], [0, 1]]
    assert both.share_used == Decimal("0.5")
    assert compared["run-2"].share_used is None, "OpenCost has not seen it"
    assert compared["no run"].ledger == 0


@pytest.mark.parametrize("text", ["", "[]", '{"data": [{"a": {"name": "a"}}]}', '{"data": []}', '{"data": [null]}'])
def test_another_file_is_refused_with_what_to_ask_opencost_for(text: str) -> None:
    with pytest.raises(ConfigError, match=r"aggregate=label:fedtide\.dev/run"):
        opencost.read(text, "a.json")
