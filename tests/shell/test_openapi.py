"""The API's description: every route is in it, and what the API answers is what it says."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import content_type_conformance, response_schema_conformance

from fedtide.console import endpoints
from fedtide.fabric.events.costs import PricesApplied, UsageReported, UsedFor
from fedtide.fabric.events.envelope import TriggerApplied
from fedtide.fabric.events.runs import AggregatorStarted, RunCompleted
from fedtide.fabric.messages.usage import Usage
from fedtide.fabric.plans.prices import PriceBook
from tests.scenarios.build import closed, joined, opened, produced, published, received, requested, rollout, wave
from tests.scenarios.test_ledger import BOOK
from tests.shell.served_api import Served, served_api
from tests.shell.test_takes_anything import RULE

EXAMPLES = 6


@pytest.fixture(scope="module")
def api() -> Iterator[Served]:
    used = UsageReported(source="c", items=[UsedFor(region="eu", phase="serve", usage=Usage(cpu_us=10**9))])
    story = [
        *(joined("n1"), requested(model="m"), AggregatorStarted(run="run-1", attempt=1), opened(1, "n1")),
        *(received(1, "n1"), closed(1, accuracy=0.5), produced(), RunCompleted(run="run-1", attempt=1), published()),
        *(rollout(wave("eu", "n1")), TriggerApplied(rule=RULE), PricesApplied(book=BOOK), used),
    ]
    with served_api(*story) as served:
        yield served


def ask(served: Served, path: str, **headers: str) -> httpx.Response:
    return httpx.get(served.url + path, headers=headers, timeout=10)


def described(served: Served) -> dict[str, Any]:
    found: dict[str, Any] = ask(served, "/v1/openapi.json").json()
    return found


def test_every_route_is_described_and_every_call_of_the_client_too(api: Served) -> None:
    paths = described(api)["paths"]
    there = {(method.upper(), path) for path, methods in paths.items() for method in methods}
    assert there == {*api.routes, ("GET", "/v1/openapi.json")}
    ids = [operation["operationId"] for methods in paths.values() for operation in methods.values()]
    assert len(ids) == len(set(ids))
    for call in (
        endpoints.status(),
        endpoints.costs("model"),
        endpoints.apply_prices(PriceBook()),
        endpoints.budgets(),
    ):
        assert (call.method, call.path.partition("?")[0]) in there


def test_what_the_api_answers_to_anything_that_fits_its_description_is_as_described(api: Served) -> None:
    """Streams do not end by themselves; the rest is asked with what Hypothesis makes of the types."""
    schema = schemathesis.openapi.from_dict({**described(api), "servers": [{"url": api.url}]})
    asked = 0
    for found in schema.get_all_operations():
        operation = found.ok()
        if operation.path.endswith("/watch"):
            continue

        @given(case=operation.as_strategy())
        @settings(max_examples=EXAMPLES, deadline=None, phases=[Phase.generate], suppress_health_check=[*HealthCheck])
        def fits(case: schemathesis.Case) -> None:
            response = case.call(base_url=api.url, timeout=20)
            checks = [not_a_server_error, content_type_conformance, response_schema_conformance]
            if response.status_code == 503:  # nobody carries commands out here: a node that is asked does not answer
                checks.remove(not_a_server_error)
            case.validate_response(response, checks=checks)

        fits()
        asked += 1
    assert asked > 45


def test_what_has_not_changed_is_not_sent_again(api: Served) -> None:
    first = ask(api, "/v1/models")
    tag = first.headers["ETag"]
    again = ask(api, "/v1/models", **{"If-None-Match": tag})
    assert (again.status_code, again.content, again.headers["ETag"]) == (304, b"", tag)
    assert ask(api, "/v1/models", **{"If-None-Match": '"other"'}).status_code == 200
    assert ask(api, "/v1/models/none", **{"If-None-Match": "*"}).status_code == 404


@pytest.mark.parametrize("path", ["/v1/runs/run-1/watch"])
def test_browsers_get_changes_as_server_sent_events(api: Served, path: str) -> None:
    answer = ask(api, path, Accept="text/event-stream")
    assert answer.headers["Content-Type"].startswith("text/event-stream")
    *views, end = answer.text.strip().split("\n\n")
    assert all(json.loads(view.removeprefix("data: "))["run"] == "run-1" for view in views)
    assert end.startswith("event: end")
    assert json.loads(ask(api, path).text.splitlines()[0])["run"] == "run-1", "programs get lines"


def test_errors_are_problem_documents(api: Served) -> None:
    for path in ("/v1/costs?by=planet", "/v1/runs/none", "/v1/costs/lines?limit=0", "/v1/costs?since=yesterday"):
        answer = ask(api, path)
        assert answer.headers["Content-Type"].startswith("application/problem+json")
        assert answer.json()["detail"]
