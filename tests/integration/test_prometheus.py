"""A real Prometheus judges roll-outs; the chart's rules and dashboard work on what it scrapes of a coordinator."""

from __future__ import annotations

import json
import urllib.parse
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from fedtide.fabric.messages.views import RolloutView
from tests.cluster.test_alert_rules import rules_of_the_chart
from tests.cluster.test_charts import CLOUD
from tests.conftest import APPS
from tests.integration.conftest import bring_up
from tests.integration.installation import Installation, until
from tests.integration.otlp_receiver import receiving
from tests.integration.prometheus_server import Prometheus, page_of, scraping
from tests.integration.releases import release

pytestmark = pytest.mark.slow  # Debian's prometheus

SERIES = 'shop_errors{region="eu"}'


@pytest.fixture(scope="module")
def shop() -> Iterator[dict[str, str]]:
    """Metrics of a shop, as the test sets them, and where they are served."""
    metrics: dict[str, str] = {SERIES: "0.01"}
    with page_of(metrics) as address:
        metrics["# at"] = address
        yield metrics


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Installation, str]]:
    """An installation that may ask a Prometheus which is not there yet, and where that has to listen."""
    with receiving() as collector:
        there = bring_up(
            tmp_path_factory.mktemp("watched"), "eu", 2, "--coordinator-set", f"traces={{endpoint: {collector.url}}}"
        )
        yield there, there.state["apis"][0]
        there.run("down")


def test_rules_and_dashboard_work_on_a_real_server_and_exemplars_lead_to_traces(
    watched: tuple[Installation, str], tmp_path: Path
) -> None:
    there, api = watched
    with scraping(tmp_path, {"fedtide": urllib.parse.urlsplit(api).netloc}, yaml.safe_dump(rules_of_the_chart())) as db:
        view = there.train(APPS / "mean", "--rounds", "2")
        assert view.state == "completed"
        until(lambda: db.value("fedtide_round_seconds_count") == 3.0, "the rounds")  # and the evaluation before them
        groups = db.get("rules")["groups"]
        until(lambda: all(r["health"] == "ok" for g in db.get("rules")["groups"] for r in g["rules"]), "healthy rules")
        assert sum(len(group["rules"]) for group in groups) >= 8
        firing = {a["labels"]["alertname"] for a in db.get("alerts")["alerts"] if a["state"] == "firing"}
        assert not firing
        for panel in json.loads((CLOUD / "dashboards" / "fedtide.json").read_text())["panels"]:
            for target in panel["targets"]:
                assert db.get("query", query=target["expr"])["resultType"] == "vector", panel["title"]
        assert db.value('sum(fedtide_nodes{state="online"})') == 2
        now = db.get("query", query="time()")["result"][0]
        found = db.get("query_exemplars", query="fedtide_round_seconds_bucket", start=str(now - 300), end=str(now + 9))
        labels = [e["labels"] for series in found for e in series["exemplars"]]
        assert labels and all(len(each["trace_id"]) == 32 for each in labels)


def test_a_roll_out_is_judged_by_what_prometheus_answers_and_stops_when_it_gives_no_value(
    tmp_path: Path, shop: dict[str, str]
) -> None:
    with scraping(tmp_path / "db", {"shop": shop["# at"]}, "") as db:
        there = bring_up(tmp_path / "home", "eu", 2, "--coordinator-set", f"prometheus={{main: {{url: {db.url}}}}}")
        try:
            _judged(there, db, shop)
        finally:
            there.run("down")


def _judged(there: Installation, db: Prometheus, shop: dict[str, str]) -> None:
    def roll_out(factor: float, shown: float | None, query: str = 'max(shop_errors{region="$region"})') -> str:
        until(lambda: str(db.value(SERIES)) == str(shown), f"{shown} in Prometheus")
        release(there, factor)
        gate = {"kind": "query", "query": query, "most": 0.05, "every_s": 1}
        started = there.json("rollout", "start", "scale", "--bake", "0", "--set", f"gates={json.dumps([gate])}")
        return str(started["rollout"])

    def ends(key: str, state: str) -> RolloutView:
        until(lambda: there.rollout(key).state in (state, "completed", "rolledback"), state)
        view = there.rollout(key)
        assert view.state == state, view
        return view

    ends(roll_out(1.0, 0.01), "completed")
    shop[SERIES] = "0.5"
    assert "query: 0.5, allowed at most 0.05" in ends(roll_out(2.0, 0.5), "rolledback").reason
    shop[SERIES] = "NaN"
    held = roll_out(3.0, float("nan"))
    assert "the answer is nan" in ends(held, "paused").reason
    shop[SERIES] = "0.02"
    until(lambda: db.value(SERIES) == 0.02, "0.02 in Prometheus")
    assert there.run("rollout", "resume", held).returncode == 0
    ends(held, "completed")
    assert "is empty" in ends(roll_out(4.0, 0.02, "nobody_has_this"), "paused").reason
    assert "2 series" in ends(roll_out(5.0, 0.02, '{__name__=~"up|shop_errors"}'), "paused").reason
    assert "Prometheus says" in ends(roll_out(6.0, 0.02, "max("), "paused").reason
    last = roll_out(7.0, 0.02, "max(shop_errors) > bool 9 or on() vector(0)")
    ends(last, "completed")
    key = roll_out(8.0, 0.02, "rate(shop_errors[1h:])")
    db.stop()
    assert "gives no answer" in ends(key, "paused").reason


def test_a_gate_over_a_server_that_nobody_named_is_refused_at_once(watched: tuple[Installation, str]) -> None:
    there, _ = watched
    release(there, 1.0)
    gate = json.dumps([{"kind": "query", "query": "up", "least": 1}])
    done = there.run("rollout", "start", "scale", "--set", f"gates={gate}")
    assert done.returncode == 2 and "the coordinator's `prometheus`" in done.stderr
