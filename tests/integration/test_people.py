"""Tokens with roles, and the trail of what was done with them."""

from __future__ import annotations

import asyncio
import json
from datetime import UTC, datetime
from pathlib import Path

import httpx

from fedtide.fabric.nats.subjects import AUDIT
from tests.conftest import APPS
from tests.integration.installation import Installation


def _ran(there: Installation, *words: str) -> str:
    done = there.run(*words)
    assert done.returncode == 0, done.stderr
    return done.stdout


def _token(there: Installation, name: str, role: str, *more: str) -> str:
    return _ran(there, "token", "create", name, "--role", role, *more).strip()


def _call(there: Installation, token: str, method: str, path: str, body: object = None) -> httpx.Response:
    headers = {"Authorization": f"Bearer {token}", "Fedtide-By": "a test"}
    return httpx.request(method, f"{there.state['apis'][0]}{path}", headers=headers, json=body)


CALLS: tuple[tuple[str, str, object, str], ...] = (
    ("GET", "/v1/runs", None, "viewer"),
    ("GET", "/v1/trust", None, "viewer"),
    ("POST", "/v1/rollouts/plan", {}, "viewer"),
    ("POST", "/v1/runs", {}, "operator"),
    ("DELETE", "/v1/triggers/none", None, "operator"),
    ("POST", "/v1/nodes/eu-1/quarantine", {"lift": True}, "operator"),
    ("GET", "/v1/audit", None, "admin"),
    ("GET", "/v1/tokens", None, "admin"),
    ("POST", "/v1/join-tokens", {}, "admin"),
    ("PUT", "/v1/trust", {}, "admin"),
    ("PUT", "/v1/prices", {"nonsense": 1}, "admin"),
    ("DELETE", "/v1/regions/none", None, "admin"),
)


def test_a_role_may_do_what_it_says_and_nothing_more(installation: Installation) -> None:
    roles = ("viewer", "operator", "admin")
    tokens = {role: _token(installation, f"a {role}", role) for role in roles}
    for method, path, body, needed in CALLS:
        for role in roles:
            status = _call(installation, tokens[role], method, path, body).status_code
            assert (status == 403) == (roles.index(role) < roles.index(needed)), (method, path, role, status)
    who = _call(installation, tokens["operator"], "GET", "/v1/whoami").json()
    assert (who["name"].startswith("a operator"), who["role"], who["via"]) == (True, "operator", "service token")
    assert json.loads(_ran(installation, "whoami", "-o", "json"))["via"] == "local token"


def test_a_token_that_is_withdrawn_expired_or_guessed_is_nobodys(installation: Installation) -> None:
    token, short = _token(installation, "gone", "admin"), _token(installation, "short", "admin", "--ttl", "0.1s")
    assert _call(installation, token, "GET", "/v1/runs").status_code == 200
    _ran(installation, "token", "rm", token.split("_")[1])
    for shown in (token, short, f"{token}x", "fts__", "fts_x", "a.b.c", "x"):
        assert _call(installation, shown, "GET", "/v1/runs").status_code == 401, shown
    listed = {view["name"]: view["state"] for view in json.loads(_ran(installation, "token", "ls", "-o", "json"))}
    assert (listed["gone"], listed["short"]) == ("revoked", "expired")
    assert token.split("_")[2] not in _ran(installation, "events", "query", "--limit", "1000")


def test_what_was_done_stands_in_the_trail_with_who_and_from_where(installation: Installation, tmp_path: Path) -> None:
    token = _token(installation, "ci", "operator")
    _call(installation, token, "PUT", "/v1/triggers/audited", {"name": "audited", "on": "x", "do": {"kind": "nothing"}})
    _call(installation, token, "POST", "/v1/join-tokens", {})
    head = _ran(installation, "audit", "verify").splitlines()[-1].removeprefix("head: ")
    entries = json.loads(_ran(installation, "audit", "query", "--who", "ci", "-o", "json"))
    refused, denied = entries[-2:]
    assert (refused["action"], refused["outcome"]) == ("PUT /v1/triggers/audited", "400")
    assert refused["reason"]
    assert (denied["action"], denied["outcome"], denied["role"]) == ("POST /v1/join-tokens", "403", "operator")
    assert (denied["origin"], denied["behalf"], denied["via"]) == ("127.0.0.1", "a test", "service token")
    assert '"name": "audited"' in refused["asked"]

    run = installation.train(APPS / "mean", "--rounds", "1").run
    assert any(e["action"] == "POST /v1/runs" for e in json.loads(_ran(installation, "audit", "query", "-o", "json")))
    rule = tmp_path / "rule.yaml"
    rule.write_text(f"name: again\non: com.example.again\ndo: {{kind: round, model: none-{run}}}\n")
    _ran(installation, "trigger", "apply", str(rule))
    _ran(installation, "trigger", "fire", "--type", "com.example.again")
    installation.until_events("trigger.firing_failed", "again")
    (fired,) = json.loads(_ran(installation, "audit", "query", "--who", "rule again", "-o", "json"))
    assert (fired["via"], fired["outcome"]) == ("rule", "failed")
    _ran(installation, "trigger", "rm", "again")
    _ran(installation, "audit", "verify", "--head", head)

    exported = tmp_path / "trail.jsonl"
    _ran(installation, "audit", "export", "--file", str(exported))
    assert "whole" in _ran(installation, "audit", "verify", "--file", str(exported))
    exported.write_text(exported.read_text().replace("POST /v1/join-tokens", "GET /v1/join-tokens", 1))
    tampered = installation.run("audit", "verify", "--file", str(exported))
    assert tampered.returncode != 0
    assert "was changed" in tampered.stderr
    assert all(
        line.startswith("CEF:0|fedtide|")
        for line in _ran(installation, "audit", "export", "--format", "cef").splitlines()
    )


def test_nobody_takes_an_entry_out_of_the_trail(installation: Installation) -> None:
    async def try_to() -> None:
        broker = await installation.hub.connect("tamperer")
        before = await broker.last_sequence(AUDIT)
        for verb, body in (("STREAM.MSG.DELETE", b'{"seq": 1}'), ("STREAM.PURGE", b"{}")):
            answer = json.loads(await broker.ask(f"$JS.API.{verb}.{AUDIT}", body))
            assert "error" in answer, verb
        assert await broker.last_sequence(AUDIT) == before
        await broker.close()

    asyncio.run(try_to())


def test_where_nobody_logs_in_it_is_said(installation: Installation) -> None:
    done = installation.run("login")
    assert done.returncode != 0
    assert "no identity provider" in done.stderr
    assert installation.run("logout").returncode == 0


def test_who_comes_in_by_the_page_and_who_is_not_let_in_stands_in_the_trail_without_what_they_showed(
    installation: Installation,
) -> None:
    token, began = _token(installation, "looker", "viewer"), datetime.now(UTC)
    api = installation.state["apis"][0]
    for shown in ("wrong-secret-1", "wrong-secret-2", token):
        httpx.post(f"{api}/ui/login", data={"token": shown})
    for _ in range(3):
        assert _call(installation, "wrong-secret-3", "DELETE", "/v1/triggers/none").status_code == 401
    entries = json.loads(_ran(installation, "audit", "query", "--limit", "1000", "-o", "json"))
    (opened,) = [e for e in entries if e["action"] == "POST /ui/login" and e["outcome"] == "200"]
    assert (opened["who"].partition(" ")[0], opened["role"], opened["origin"]) == ("looker", "viewer", "127.0.0.1")
    refused = [e for e in entries if e["outcome"] == "401"]
    assert {(e["who"], e["origin"], e["asked"]) for e in refused} == {("nobody", "127.0.0.1", "")}
    assert sum(datetime.fromisoformat(e["at"]) >= began for e in refused) <= 1, "an address fills no trail"
    whole = json.dumps(entries)
    assert not any(secret in whole for secret in ("wrong-secret", token.split("_")[2]))
