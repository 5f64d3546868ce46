"""Hostile and mistyped input to every route and every command: an error that says what is wrong, never a traceback.

What a failure looks like: a status of 5xx, an answer that is no problem document, exit code 70, or a
listing that no longer works because of what was stored.
"""

from __future__ import annotations

import json
import random
import re
import socket
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from urllib.parse import quote_from_bytes

import click
import pytest
import typer.main

from fedtide.console.cli import __main__ as cli
from fedtide.fabric.events.envelope import TriggerApplied
from fedtide.fabric.plans.trigger_rule import TriggerRule
from tests.conftest import APPS
from tests.scenarios.build import joined, produced, published, requested, rollout, wave
from tests.shell.served_api import Served, served_api

RULE = TriggerRule.model_validate({"name": "r1", "on": "a.b", "do": {"kind": "round", "model": "m"}})
TEXTS = [
    *("", " ", "r1#2", "r1?2", "r1/..", "..", "%2e%2e", "a b", "a\nb", "a\tb", "Zürich", "日本", "\x7f", "\u200b"),
    *("[/var/log/x]", "[red]x[/red]", "[torch]", "{0}", "%s", "'", '"', "\\", "-", "--", "*", ">", "a.b", "$JS.API"),
    *(
        "²",
        "9" * 5000,
        "1e400",
        "1e300",
        "-1",
        "0",
        "NaN",
        "inf",
        "true",
        "null",
        "1e-3",
        "0x1f",
        "2026-01-01",
        "a=b=c",
        "=b",
    ),
    *("a" * 10_000, "<script>", "; rm -rf", "../../etc/passwd", "\u202eabc", "🦊"),
]
RAW = [b"\xff\xfe", b"Z\xfcrich", b"\xed\xa0\x80", b"\x00", b"%ff", b"%", b"%zz", b"%00"]
BODIES = [
    *(b"", b"{", b"[]", b"null", b"1", b'"x"', b"\xff", b"{}", b'{"a": "\\ud800"}', b'{"a": 1e400}', b'{"a": NaN}'),
    *(b"[" * 100_000, b'{"a":' * 10_000, b'{"a": ' + b"9" * 5000 + b"}", b'{"a": 1, "a": 2}', b"\xef\xbb\xbf{}"),
]
HEADERS = [
    *(b"Content-Encoding: gzip", b"Content-Encoding: nonsense", b"Transfer-Encoding: gzip", b"Expect: what"),
    *(b"Content-Type: \xff", b"Content-Type: text/plain; charset=nonsense", b"Idempotency-Key: Z\xfcrich"),
    *(b"Fedtide-By: Z\xfcrich\x01", b"ce-subject: Z\xfcrich", b"Authorization: Bearer \xff", b"Range: bytes=9-1"),
    *(b"Inference-Header-Content-Length: \xb2", b"Inference-Header-Content-Length: -1", b"Host: \xff"),
    *(b"ce-id: \xff", b"ce-type: ", b"ce-time: never", b"Content-Length: -5", b"Cookie: " + b"a" * 9000),
]
EVENT = {"specversion": "1.0", "id": "1", "source": "s", "type": "a.b"}


@pytest.fixture(scope="module")
def api() -> Iterator[Served]:
    story = [joined("n1"), requested(), produced(), published(), rollout(wave("eu", "n1")), TriggerApplied(rule=RULE)]
    with served_api(*story) as served:
        yield served


def ask(api: Served, method: str, target: bytes, headers: Sequence[bytes] = (), body: bytes = b"") -> tuple[int, bytes]:
    """Status and the beginning of the answer, of a request whose bytes no client library would send."""
    lines = [method.encode() + b" " + target + b" HTTP/1.1", b"Host: x", b"Connection: close", *headers]
    if body and not any(h.lower().startswith((b"content-length", b"transfer-encoding")) for h in headers):
        lines.append(b"Content-Length: %d" % len(body))
    with socket.create_connection((api.host, api.port), timeout=20) as connection:
        with suppress(BrokenPipeError, ConnectionResetError):  # it was refused before it was read
            connection.sendall(b"\r\n".join(lines) + b"\r\n\r\n" + body)
        found = b""
        with suppress(ConnectionResetError):
            while len(found) < 4096 and b"ndjson" not in found and (part := connection.recv(4096)):
                found += part  # a watch does not end
    status = re.match(rb"HTTP/1\.\d (\d{3})", found)
    assert status, f"no answer to {method} {target!r}: {found[:200]!r}"
    return int(status[1]), found


def takes(api: Served, method: str, target: bytes, headers: Sequence[bytes] = (), body: bytes = b"") -> None:
    status, found = ask(api, method, target, headers, body)
    said = f"{method} {target[:100]!r} {headers} {body[:60]!r}: {found[:600]!r}"
    assert status < 500, said
    if status in (401, 409, 413):
        assert b"application/problem+json" in found, said


def as_part(text: str | bytes) -> bytes:
    return quote_from_bytes(text if isinstance(text, bytes) else text.encode(), safe="").encode() or b"%20"


def filled(path: str, value: bytes) -> bytes:
    return re.sub(r"\{[^}]+\}", "\0", path).encode().replace(b"\0", value)


@pytest.mark.parametrize("part", TEXTS + RAW)
def test_no_route_breaks_on_a_name(api: Served, part: str | bytes) -> None:
    for method, path in api.routes:
        if "{" in path:
            takes(api, method, filled(path, as_part(part)[:6000]), body=b"{}")
            if isinstance(part, bytes) and b"\x00" not in part:
                takes(api, method, filled(path, part), body=b"{}")


@pytest.mark.parametrize("value", TEXTS[::2] + RAW)
def test_no_route_breaks_on_a_query(api: Served, value: str | bytes) -> None:
    names = ("limit", "after", "state", "region", "labels", "kind", "about", "since", "until", "round", "timeout_s")
    for method, path in api.routes:
        if method == "GET" and "watch" not in path:
            for name in names:
                takes(api, method, filled(path, b"run-1") + b"?" + name.encode() + b"=" + as_part(value)[:6000])


@pytest.mark.parametrize("body", BODIES)
def test_no_route_breaks_on_a_body(api: Served, body: bytes) -> None:
    for method, path in api.routes:
        if method in ("POST", "PUT"):
            takes(api, method, filled(path, b"no-such-thing"), body=body)


@pytest.mark.parametrize("header", HEADERS)
def test_no_route_breaks_on_a_header(api: Served, header: bytes) -> None:
    for method, path in api.routes:
        if "watch" not in path:
            takes(api, method, filled(path, b"no-such-thing"), [header], b"{}" if method in ("POST", "PUT") else b"")


@pytest.mark.parametrize("text", TEXTS)
def test_no_event_breaks_the_coordinator_or_a_later_listing(api: Served, text: str) -> None:
    for field in ("id", "type", "source", "subject", "time", "data"):
        takes(api, "POST", b"/v1/events", [b"Content-Type: application/cloudevents+json"], _json(EVENT, field, text))
        headers = [f"ce-{k}: {v}".encode() for k, v in {**EVENT, field: text.replace("\n", "")[:2000]}.items()]
        takes(api, "POST", b"/v1/events", headers, b"{}")
    for listing in (b"/v1/events", b"/v1/triggers", b"/v1/runs", b"/metrics", b"/v1/status", b"/v1/why/r1"):
        assert ask(api, "GET", listing)[0] == 200


def _json(event: dict[str, str], field: str, text: str) -> bytes:
    return json.dumps({**event, field: text}).encode()


@pytest.mark.parametrize("seed", range(5))
def test_no_route_breaks_on_a_body_that_is_almost_right(api: Served, seed: int) -> None:
    """Bodies that are right but for one value somewhere."""
    chance = random.Random(seed)
    values: list[object] = [*TEXTS, 0, -1, 10**400, 1.5, True, None, [], {}, [[]], {"": ""}, float("inf"), float("nan")]
    right = {
        ("POST", b"/v1/runs"): {"model": "m", "rounds": 1, "selector": {"a": "b"}, "policy": {"min_nodes": 1}},
        ("POST", b"/v1/rollouts"): {"model": "m", "canary": 0.3, "bake": {"seconds": 1}, "regions": ["eu"]},
        ("POST", b"/v1/rollouts/plan"): {"model": "m", "canary": 0.3, "gates": [{"kind": "latency"}]},
        ("PUT", b"/v1/triggers/r1"): RULE.model_dump(mode="json"),
        ("POST", b"/v1/triggers/r1/test"): {**EVENT, "data": {"x": 1}},
        ("POST", b"/v1/events"): {**EVENT, "data": {"x": 1}},
        ("POST", b"/v1/runs/run-1/pause"): {"reason": "r"},
        ("POST", b"/v1/rollouts/ro-1/promote"): {"reason": "r", "region": "eu"},
        ("POST", b"/v1/join-tokens"): {"region": "eu", "uses": 1, "ttl_s": 60},
        ("POST", b"/v1/nodes/n1/revoke"): {"reason": "r"},
        ("POST", b"/v1/nodes/no/samples/m/labels"): {"labels": {"a": 1}},
        ("POST", b"/v1/nodes/no/samples/m/forget"): {"id": "a", "before": "2026-01-01T00:00:00Z"},
    }
    for (method, target), body in right.items():
        for _ in range(40):
            changed = json.loads(json.dumps(body))
            place = chance.choice(list(changed))
            if isinstance(changed[place], dict) and changed[place] and chance.random() < 0.7:
                inner = chance.choice(list(changed[place]))
                changed[place][inner] = chance.choice(values)
            else:
                changed[place] = chance.choice(values)
            takes(api, method, target, [b"Content-Type: application/json"], json.dumps(changed).encode())


# -- the command line -----------------------------------------------------------------------------------------

_STARTS_PROCESSES = {"up", "down", "demo", "agent", "coordinator", "k8s"}
_DOES_NOT_END = {("events", "watch"), ("events", "tail")}


def leaves(command: click.Command, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    if isinstance(command, click.Group):
        for name, inner in command.commands.items():
            if (*path, name) not in _DOES_NOT_END and not (not path and name in _STARTS_PROCESSES):
                yield from leaves(inner, (*path, name))
    else:
        yield path, command


COMMAND = typer.main.get_command(cli.app)
COMMANDS = dict(leaves(COMMAND))


@pytest.fixture
def home(tmp_path: Path, api: Served, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FEDTIDE_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("FEDTIDE_SERVER", api.url)
    monkeypatch.delenv("FEDTIDE_TOKEN", raising=False)
    monkeypatch.setattr(cli, "app", COMMAND)  # built once, not for every line
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(capsys: pytest.CaptureFixture[str], *words: str) -> int:
    """One command as a person types it; fails if it breaks."""
    before, sys.argv = sys.argv, ["fedtide", *words]
    try:
        code = cli.main()
    finally:
        sys.argv = before
    said = capsys.readouterr()
    shown = f"fedtide {[w[:80] for w in words]} -> {code}: {said.err[-600:]}"
    assert code != cli.INTERNAL, shown
    assert "Traceback" not in said.out + said.err and "Internal Server Error" not in said.err, shown
    assert code == 0 or said.err.strip(), f"it fails and says nothing: {shown}"
    return code


def lines(command: click.Command, value: str, chance: random.Random) -> Iterator[list[str]]:
    """The command with the value in every place in turn, and something harmless elsewhere."""
    arguments = [p for p in command.params if isinstance(p, click.Argument)]
    options = [p for p in command.params if isinstance(p, click.Option) and not p.is_flag]
    plain = ["no-such-thing" for _ in arguments]
    for place in range(len(arguments)):
        yield ["--", *plain[:place], value, *plain[place + 1 :]]
    for option in options:
        if "--timeout" not in option.opts:
            given = value if "set" not in option.opts[-1] or chance.random() < 0.3 else f"key={value}"
            yield [f"{option.opts[-1]}={given}", "--", *plain]


PROCESSES = (("backup",), ("node", "policy", "check"))
"""They start one for each value."""


@pytest.mark.parametrize(
    "path",
    [pytest.param(p, marks=pytest.mark.slow) if p in PROCESSES else p for p in COMMANDS],
    ids=" ".join,
)
def test_no_command_breaks_on_an_argument(
    home: Path, capsys: pytest.CaptureFixture[str], path: tuple[str, ...]
) -> None:
    chance = random.Random(" ".join(path))
    for value in [*chance.sample(TEXTS, 6), "\udcff"]:
        for words in lines(COMMANDS[path], value, chance):
            run(capsys, *path, *words)


def test_listings_still_work_after_all_that(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for reason in TEXTS:
        run(capsys, "rollout", "abort", "ro-1", f"--reason={reason}")
    for path in COMMANDS:
        if path[-1] == "ls" and path[0] != "samples":
            assert run(capsys, *path) == 0
    for name in ("run-1", "ro-1", "r1", "n1"):
        assert run(capsys, "why", name) == 0


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff\xfe",
        b"name: x\nname: y\n",
        b"{",
        b"- a\n",
        b"a: [",
        b"\x00",
        b"name: r9\n" * 3,
        b"&a [*a]",
        b"!!python/x 1",
    ],
)
def test_no_file_breaks_a_command(home: Path, capsys: pytest.CaptureFixture[str], content: bytes) -> None:
    file = home / "file.yaml"
    file.write_bytes(content)
    for words in (
        ("trigger", "apply", str(file)),
        ("rollout", "plan", "m", "--plan", str(file)),
        ("infer", "m", "--node", "nobody", "--input", str(file)),
        ("samples", "label", "m", str(file), "--node", "nobody"),
        ("trigger", "apply", str(home)),
        ("run", "start", str(file)),
        ("model", "pull", "m", "--file", str(home)),
    ):
        assert run(capsys, *words) != 0


def test_whatever_was_named_is_removed_and_nothing_else(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("r1#2", "r1?2", "r1/", "../r1", "r1%20", "r1 ", "R1"):
        assert run(capsys, "trigger", "rm", "--", name) != 0
    assert run(capsys, "trigger", "show", "r1") == 0


def test_a_mistake_is_named(home: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """What was typed, and words that the error must hold."""
    app = str(APPS / "mean")
    for words, told in {
        ("why", "n1/1"): "only runs have rounds",
        ("why", "run-1/x"): "not a number",
        ("run", "start", "--app", app, "--select", "needs=+"): "--select needs",
        ("run", "start", "--app", app, "--round-timeout", "nan"): "--round-timeout",
        ("rollout", "plan", "m", "--set", "canary=.inf"): "canary",
        ("run", "wait", "run-1", "--timeout", "nan"): "--timeout",
    }.items():
        monkeypatch.setattr(sys, "argv", ["fedtide", *words])
        assert cli.main() != 0
        assert told in capsys.readouterr().err, words
