"""The chart's rules as Prometheus' own tool judges them over made-up series: each fires when it should, not before."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.cluster.test_charts import CLOUD, render

pytestmark = pytest.mark.slow  # Debian's prometheus

PROMTOOL = shutil.which("promtool") or "/usr/bin/promtool"


def rules_of_the_chart() -> dict[str, Any]:
    values = {
        "regions": ["eu"],
        "serviceMonitor": {"enabled": True},
        "networkPolicy": {"ingressFrom": [{"namespaceSelector": {}}]},
    }
    (rules,) = [b for b in render(CLOUD, values) if b["kind"] == "PrometheusRule"]
    spec: dict[str, Any] = rules["spec"]
    return spec


CASES: dict[str, tuple[dict[str, str], str, str, dict[str, str]]] = {
    # Alert: series, when it does not fire yet, when it does, and its labels.
    "FedtideStreamFills": (
        {
            'fedtide_stream_bytes{region="eu",stream="UP"}': "90x30",
            'fedtide_stream_limit_bytes{region="eu",stream="UP"}': "100x30",
            'fedtide_stream_bytes{region="eu",stream="PARKED"}': "100x30",
            'fedtide_stream_limit_bytes{region="eu",stream="PARKED"}': "100x30",
        },
        "4m",
        "6m",
        {"severity": "warning", "region": "eu", "stream": "UP"},
    ),
    "FedtideParked": (
        {"fedtide_reports_parked": "1x30", "fedtide_commands_parked": "0x30"},
        "14m",
        "16m",
        {"severity": "warning"},
    ),
    "FedtideClockOff": ({"fedtide_nodes_skewed": "2x30"}, "14m", "16m", {"severity": "warning"}),
    "FedtideRegionCredentialsExpire": (
        {'fedtide_region_credentials_seconds{region="eu"}': "2600000-60000x30"},
        "0m",
        "5m",
        {"severity": "warning", "region": "eu"},
    ),
    "FedtideTwins": ({"fedtide_nodes_twins": "0 0 1 1 1"}, "1m", "3m", {"severity": "warning"}),
    "FedtideRegionDark": (
        {
            'fedtide_nodes{region="eu",state="offline"}': "3x30",
            'fedtide_nodes{region="us",state="offline"}': "3x30",
            'fedtide_nodes{region="us",state="online"}': "1x30",
        },
        "9m",
        "11m",
        {"severity": "critical", "region": "eu"},
    ),
    "FedtideNoCoordinator": ({"up": "0x30"}, "4m", "6m", {"severity": "critical"}),
}


def test_every_alert_has_a_case() -> None:
    alerts = {r["alert"] for group in rules_of_the_chart()["groups"] for r in group["rules"] if "alert" in r}
    assert alerts == CASES.keys()


@pytest.mark.parametrize("alert", CASES)
def test_an_alert_fires_when_it_should(alert: str, tmp_path: Path) -> None:
    spec = rules_of_the_chart()
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump(spec))
    series, quiet, loud, labels = CASES[alert]
    (rule,) = [r for g in spec["groups"] for r in g["rules"] if r.get("alert") == alert]
    summary = rule["annotations"]["summary"]
    for name, value in labels.items():
        summary = summary.replace("{{ $labels." + name + " }}", value)
    fires = {"exp_labels": labels, "exp_annotations": {**rule["annotations"], "summary": summary}}
    case = {
        "interval": "1m",
        "input_series": [{"series": name, "values": values} for name, values in series.items()],
        "alert_rule_test": [
            {"eval_time": quiet, "alertname": alert, "exp_alerts": []},
            {"eval_time": loud, "alertname": alert, "exp_alerts": [fires]},
        ],
    }
    tests = {"rule_files": ["rules.yaml"], "evaluation_interval": "1m", "tests": [case]}
    (tmp_path / "tests.yaml").write_text(yaml.safe_dump(tests))
    done = subprocess.run([PROMTOOL, "test", "rules", "tests.yaml"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_what_is_recorded_is_what_it_says(tmp_path: Path) -> None:
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump(rules_of_the_chart()))
    buckets = {"5": "0+9x20", "10": "0+10x20", "+Inf": "0+10x20"}
    series = [{"series": f'fedtide_round_seconds_bucket{{le="{le}"}}', "values": v} for le, v in buckets.items()]
    expected = [{"labels": "fedtide:round_seconds:p95", "value": 7.5}]
    case = {
        "interval": "1m",
        "input_series": series,
        "promql_expr_test": [{"expr": "fedtide:round_seconds:p95", "eval_time": "15m", "exp_samples": expected}],
    }
    tests = {"rule_files": ["rules.yaml"], "evaluation_interval": "1m", "tests": [case]}
    (tmp_path / "tests.yaml").write_text(yaml.safe_dump(tests))
    done = subprocess.run([PROMTOOL, "test", "rules", "tests.yaml"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
