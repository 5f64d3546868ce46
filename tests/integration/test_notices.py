"""What rules tell: by webhook, Slack, e-mail and NATS, to real servers; once it is taken, and again if it was not."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from aiosmtpd.controller import Controller
from aiosmtpd.handlers import Message
from cloudevents.core.bindings.http import HTTPMessage, from_structured
from cloudevents.core.formats.json import JSONFormat

from fedtide.console.embedded.plan import free_ports
from fedtide.coordinator.adapters import notices
from fedtide.coordinator.adapters.notices import Notices, cloud_event, text_of
from fedtide.coordinator.commands import Fire
from fedtide.coordinator.config import Email, NatsSubject, Slack, Webhook
from fedtide.coordinator.triggers.triggers import Firing, Trigger, judge
from fedtide.fabric.errors import ConfigError
from fedtide.fabric.nats.broker import Broker
from fedtide.fabric.plans.trigger_rule import Notify, Signal, TriggerRule
from tests.conftest import NatsServer
from tests.integration.conftest import bring_up
from tests.integration.installation import until
from tests.integration.releases import release

BACK = Signal(
    id="evt-1",
    type="dev.fedtide.rollout.rolledback",
    fields={"model": "digits", "version": 3, "reason": "eu: <too> many & slow", "share": 0.123456789},
)


def fired(to: str, text: str = "") -> Fire:
    return Fire(TriggerRule(name="tell", on=BACK.type, do=Notify(to=to, text=text)), "notice-1", "cause", BACK)


@dataclass
class Receiver:
    url: str = ""
    taken: list[tuple[dict[str, str], Any]] = field(default_factory=list)
    refuse: list[int] = field(default_factory=list)


@contextmanager
def http_receiver() -> Iterator[Receiver]:
    """Takes what is posted; first it answers with each status of `refuse`."""
    there = Receiver()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            status = there.refuse.pop(0) if there.refuse else 200
            if status == 200:
                there.taken.append((dict(self.headers), body))
            self.send_response(status)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        there.url = f"http://127.0.0.1:{server.server_port}/hook"
        yield there
        server.shutdown()


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with http_receiver() as there:
        yield there


def _file(folder: Path, text: str) -> Path:
    (folder / "secret").write_text(text + "\n")
    return folder / "secret"


async def test_a_webhook_gets_a_cloud_event_that_the_sdk_reads(receiver: Receiver, tmp_path: Path) -> None:
    (tmp_path / "token").write_text("t0ken\n")
    hook = Webhook(url_file=_file(tmp_path, receiver.url), token_file=tmp_path / "token")
    receiver.refuse = [503, 429]
    await Notices({"ops": hook}).send(fired("ops", "$model v$version went back: $reason"))
    ((headers, body),) = receiver.taken
    assert headers["Authorization"] == "Bearer t0ken"
    event = from_structured(HTTPMessage(headers, json.dumps(body).encode()), JSONFormat())
    assert (event.get_id(), event.get_type(), event.get_subject()) == ("notice-1", BACK.type, "tell")
    assert event.get_data() == {**BACK.fields, "text": "digits v3 went back: eu: <too> many & slow"}


async def test_slack_gets_a_text_in_which_nothing_is_markup(receiver: Receiver, tmp_path: Path) -> None:
    await Notices({"chat": Slack(url_file=_file(tmp_path, receiver.url))}).send(fired("chat", "$reason"))
    assert receiver.taken[0][1] == {"text": "eu: &lt;too&gt; many &amp; slow"}


async def test_a_channel_that_refuses_is_not_asked_again_and_its_url_is_not_told(
    receiver: Receiver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    receiver.refuse = [404, 404]
    hooks = Notices({"ops": Webhook(url_file=_file(tmp_path, receiver.url))})
    with pytest.raises(ConfigError, match="refuses: status 404"):
        await hooks.send(fired("ops"))
    assert receiver.refuse == [404]
    monkeypatch.setattr(notices, "GIVE_UP_S", 0.3)
    gone = Notices({"ops": Webhook(url_file=_file(tmp_path, "http://127.0.0.1:9/s3cret"))})
    with pytest.raises(ConfigError, match="takes nothing: ClientConnectorError") as failed:
        await gone.send(fired("ops"))
    assert "s3cret" not in str(failed.value) and "127.0.0.1" not in str(failed.value)
    with pytest.raises(ConfigError, match=r"no channel 'nobody'.*Known: ops"):
        await gone.send(fired("nobody"))


class _Mailbox(Message):
    def __init__(self) -> None:
        super().__init__()
        self.taken: list[Any] = []

    def handle_message(self, message: Any) -> None:
        self.taken.append(message)


async def test_mail_is_taken_by_an_smtp_server_and_no_field_can_add_a_header() -> None:
    box = _Mailbox()
    (port,) = free_ports(1)
    server = Controller(box, hostname="127.0.0.1", port=port)
    server.start()
    try:
        mail = Email(host="127.0.0.1", port=port, tls="none", sender="fedtide@example.org", to=["a@example.org"])
        hidden = "=?utf-8?q?=0D=0ABcc:_evil@example.org=0D=0A=0D=0Abody?="
        signal = BACK.model_copy(update={"fields": {"model": f"digits\r\nCc: evil@example.org {hidden}", "ä": "ü"}})
        command = fired("mail", "$model went back")
        await Notices({"mail": mail}).send(Fire(command.rule, "notice-2", "cause", signal))
    finally:
        server.stop()
    (message,) = box.taken
    subject = " ".join(message["Subject"].split())  # long lines are folded
    assert subject.startswith("fedtide tell: digits Cc: evil@example.org ?utf-8?q?")
    assert message["Bcc"] is None and message["Cc"] is None and message["X-RcptTo"] == "a@example.org"
    assert "digits" in message.get_payload()


async def test_nats_gets_the_cloud_event(hub: NatsServer) -> None:
    broker = await Broker.connect(hub.url, "listener")
    got: asyncio.Queue[bytes] = asyncio.Queue()

    async def take(message: Any) -> None:
        got.put_nowait(message.data)

    await broker.subscribe("alerts.fedtide", take)
    await Notices({"bus": NatsSubject(url=hub.url, subject="alerts.fedtide")}).send(fired("bus"))
    async with asyncio.timeout(10):
        event = json.loads(await got.get())
    assert event["id"] == "notice-1" and event["data"]["model"] == "digits"
    await broker.close()


def test_of_a_channel_that_takes_nothing_no_more_than_a_queue_waits() -> None:
    rule = TriggerRule(name="tell", on=BACK.type, do=Notify(to="ops"), max_queue=2)
    waits = tuple(Firing(BACK.model_copy(update={"id": f"e{n}"}), f"notice-{n}") for n in range(2))
    assert judge(Trigger(rule, asked=waits[:1]), BACK, datetime.now(UTC))[0] == "fired"
    assert judge(Trigger(rule, asked=waits), BACK, datetime.now(UTC))[0] == "queue full"


async def test_a_secret_that_is_none_ends_in_the_rules_history(receiver: Receiver, tmp_path: Path) -> None:
    (tmp_path / "token").write_text("one\ntwo")
    hook = Webhook(url_file=_file(tmp_path, receiver.url), token_file=tmp_path / "token")
    with pytest.raises(ConfigError, match="cannot be sent: ValueError"):
        await Notices({"ops": hook}).send(fired("ops"))


def test_a_text_without_words_lists_what_is_known_and_unknown_names_stay() -> None:
    assert text_of(fired("x").rule, BACK) == (
        "dev.fedtide.rollout.rolledback: model digits, version 3, reason eu: <too> many & slow, share 0.123457"
    )
    assert text_of(fired("x", "$$5 for $nobody, $model.").rule, BACK) == "$5 for $nobody, digits."


def test_a_trace_goes_on_in_what_is_sent() -> None:
    parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    signal = BACK.model_copy(update={"fields": {"traceparent": parent}})
    event = cloud_event("notice-1", fired("x").rule, signal, datetime.now(UTC))
    assert event["traceparent"] == parent and event["data"] == {"text": f"{BACK.type}: "}


@pytest.mark.slow
def test_a_roll_out_that_is_paused_is_told_and_a_channel_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with http_receiver() as receiver:
        channel = f"notify={{ops: {{kind: webhook, url_file: {_file(tmp_path, receiver.url)}}}}}"
        there = bring_up(tmp_path / "home", "eu", 1, "--coordinator-set", channel)
        try:
            rule = (
                "name: {name}\non: dev.fedtide.rollout.*\ndo: {{kind: notify, to: {to}, text: '$rollout: $reason'}}\n"
            )
            for name, to, code in (("tell", "ops", 0), ("other", "nobody", 2)):
                (tmp_path / "rule.yaml").write_text(rule.format(name=name, to=to))
                done = there.run("trigger", "apply", str(tmp_path / "rule.yaml"))
                assert done.returncode == code, done.stderr
            assert "Known: ops" in done.stderr
            release(there, 1.0)
            key = there.json("rollout", "start", "scale", "--bake", "3600")["rollout"]
            assert there.run("rollout", "pause", key, "--reason", "a look first").returncode == 0
            until(lambda: bool(receiver.taken), "the notice")
            assert receiver.taken[0][1]["data"]["text"] == f"{key}: paused: a look first"
            shown = there.json("trigger", "show", "tell")
            assert shown["history"][-1]["outcome"] == "fired" and shown["active"] is None
        finally:
            there.run("down")
