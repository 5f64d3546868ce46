"""The APIs of a machine: a page in a browser on it, a made-up name, and whoever reaches a port of it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import pytest
from aiohttp import web
from pydantic import ValidationError

from fedtide.coordinator.api.access import access_middleware
from fedtide.coordinator.api.http import application
from fedtide.coordinator.api.principals import Principals
from fedtide.coordinator.api.routes import Route
from fedtide.coordinator.config import CoordinatorConfig
from fedtide.coordinator.identity.people import People
from fedtide.edge_agent.serving import access
from fedtide.fabric.process.files import write_atomically
from fedtide.fabric.process.web_access import TokenFile, why_foreign
from tests.served import config as agent_config

JSON = {"Content-Type": "application/json"}
HERE = {"nats_url": "nats://127.0.0.1:1", "regions": ["eu"]}


@pytest.mark.parametrize(
    ("headers", "reason"),
    [
        ({"Host": "127.0.0.1:80", **JSON}, None),
        ({"Host": "localhost:80", "Origin": "http://localhost:80", **JSON}, None),
        ({"Host": "[::1]:80"}, None),
        ({"Host": "127.0.0.1:80", "Origin": "https://evil.example", **JSON}, "a page of https://evil.example"),
        ({"Host": "127.0.0.1:80", "Origin": "null", **JSON}, "a page of null"),
        ({"Host": "rebound.evil.example:80", **JSON}, "is not a name of this machine"),
        ({"Host": "[bad", **JSON}, "is not a name of this machine"),
        ({"Host": "127.0.0.1:80", "Content-Type": "text/plain;charset=utf-8"}, "a body of text/plain is not taken"),
        ({"Host": "127.0.0.1:80", "Content-Type": "multipart/form-data; boundary=x"}, "is not taken"),
    ],
)
def test_a_page_of_another_site_gets_nothing(headers: dict[str, str], reason: str | None) -> None:
    said = why_foreign(headers, listens_on="127.0.0.1")
    assert said is None if reason is None else said is not None and reason in said


def test_an_api_that_other_machines_reach_needs_a_token() -> None:
    for host in ("0.0.0.0", "10.0.0.1", "::"):
        with pytest.raises(ValidationError, match="http_token_file: is needed"):
            CoordinatorConfig.model_validate({**HERE, "http_host": host})
    CoordinatorConfig.model_validate({**HERE, "http_host": "0.0.0.0", "http_token_file": "t"})


async def _answers(_: web.Request) -> web.Response:
    return web.json_response({})


async def serving(app: web.Application) -> AsyncIterator[str]:
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


async def statuses(app: web.Application, calls: list[tuple[str, str, dict[str, str]]]) -> list[int]:
    found = []
    async for url in serving(app):
        async with aiohttp.ClientSession() as session:
            for method, path, headers in calls:
                async with session.request(method, url + path, data=b"{}", headers={**JSON, **headers}) as answer:
                    found.append(answer.status)
    return found


async def test_every_route_of_the_coordinator_asks_for_the_token(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("secret\n")
    principals = Principals(TokenFile(tmp_path / "token"), People, None)
    routes = [[Route("*", "/{path:.*}", _answers, "Anything")]]
    app = application(routes, checks=access_middleware(principals, "127.0.0.1"))
    right, wrong = {"Authorization": "Bearer secret"}, {"Authorization": "Bearer secre"}
    calls = [
        *(("POST", "/v1/runs", headers) for headers in ({}, wrong, right, {**right, "Origin": "http://evil.example"})),
        ("GET", "/healthz", {}),
    ]
    assert await statuses(app, calls) == [401, 401, 200, 403, 200]


@pytest.mark.parametrize(
    ("host", "token", "open_inference", "expected"),
    [
        # health, prediction, labels and samples: without a token, and with the right one
        ("127.0.0.1", False, False, [200, 200, 200, 200]),
        ("0.0.0.0", False, False, [200, 401, 401, 401]),
        ("0.0.0.0", False, True, [200, 200, 401, 401]),
        ("0.0.0.0", True, False, [200, 401, 401, 401]),
        ("127.0.0.1", True, True, [200, 200, 401, 401]),
    ],
)
async def test_a_nodes_server_gives_predictions_to_strangers_only_if_its_owner_says_so(
    tmp_path: Path, host: str, token: bool, open_inference: bool, expected: list[int]
) -> None:
    (tmp_path / "token").write_text("secret")
    file = tmp_path / "token" if token else None
    config = agent_config(tmp_path, http_host=host, http_token_file=file, open_inference=open_inference)
    app = web.Application(middlewares=[access.access_middleware(config)])
    app.router.add_route("*", "/{path:.*}", _answers)
    model = "/v2/models/m"
    paths = [
        ("GET", "/v2/health/ready"),
        ("POST", f"{model}/infer"),
        ("POST", f"{model}/labels"),
        ("DELETE", f"{model}/samples"),
    ]
    assert await statuses(app, [(m, p, {}) for m, p in paths]) == expected
    if token:
        shown = {"Authorization": "Bearer secret"}
        assert await statuses(app, [(m, p, shown) for m, p in paths]) == [200] * 4


def test_a_token_that_was_changed_counts_at_once_and_a_file_that_is_gone_changes_nothing(tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text("first")
    token = TokenFile(file)
    assert token.shown_by({"Authorization": "Bearer first"})
    write_atomically(file, b"second\n")
    assert token.shown_by({"Authorization": "Bearer second"}) and not token.shown_by({"Authorization": "Bearer first"})
    for spoil in (file.unlink, lambda: file.write_text("")):
        spoil()
        assert token.shown_by({"Authorization": "Bearer second"}) and not token.shown_by({"Authorization": "Bearer "})
