"""Tells people and other systems what a rule has seen: by webhook, Slack, e-mail or NATS.

A notice is sent at least once, under an id that stays the same when it is sent again. Where the channels lead is the
coordinator's configuration: whoever writes a rule only names one.
"""

from __future__ import annotations

import asyncio
import json
import logging
import smtplib
import ssl
import string
from collections.abc import Collection, Mapping
from datetime import UTC, datetime
from email.message import EmailMessage
from email.utils import format_datetime
from http import HTTPStatus
from typing import Any

import aiohttp

from fedtide.coordinator.commands import Fire
from fedtide.coordinator.config import Channel, Email, NatsSubject, Slack, Webhook
from fedtide.fabric.errors import ConfigError, FedtideError, TransientError
from fedtide.fabric.nats.broker import Broker
from fedtide.fabric.nats.credentials import Access
from fedtide.fabric.plans.trigger_rule import Notify, Signal, TriggerRule
from fedtide.fabric.process.retry import Backoff
from fedtide.fabric.trace_context import TRACEPARENT

log = logging.getLogger(__name__)

GIVE_UP_S = 60.0
"""A channel that takes nothing for so long has missed the notice; the rule's history says so."""
WITHIN_S = 10.0
SOURCE = "/fedtide/coordinator"
MOST_TEXT = 10_000


class _Answered(TransientError):
    """The channel answered, and may take it later."""


class Notices:
    """Sends through channels, by name."""

    def __init__(self, channels: Mapping[str, Channel]) -> None:
        self._channels = channels

    async def send(self, command: Fire) -> None:
        """Returns once the channel has taken it.

        Raises:
            ConfigError: there is no such channel, it refuses, or it has taken nothing for a minute.
        """
        rule = command.rule
        assert isinstance(rule.do, Notify)
        check(rule, self._channels)
        channel, backoff, wrong = self._channels[rule.do.to], Backoff(), ""
        event = cloud_event(command.id, rule, command.signal, datetime.now(UTC))
        try:
            async with asyncio.timeout(GIVE_UP_S):
                while True:
                    try:
                        await _send(channel, event)
                        return
                    except ConfigError:
                        raise
                    except (OSError, FedtideError, aiohttp.ClientError, smtplib.SMTPException) as exc:
                        # The URL is a secret: of an error only what names no address.
                        wrong = exc.what if isinstance(exc, _Answered) else type(exc).__name__
                        log.info("notice.waits", extra={"rule": rule.name, "channel": rule.do.to, "reason": wrong})
                    await backoff.wait()
        except ConfigError:
            raise
        except TimeoutError:
            raise ConfigError(f"notify {rule.do.to}", f"takes nothing: {wrong or 'no answer'}") from None
        except Exception as exc:  # a secret with a line break, a text that no header can hold, ...
            log.exception("notice.failed", extra={"rule": rule.name, "channel": rule.do.to})
            raise ConfigError(f"notify {rule.do.to}", f"cannot be sent: {type(exc).__name__}") from None


def check(rule: TriggerRule, channels: Collection[str]) -> None:
    """Raises ConfigError if a rule names a channel that is not there."""
    if isinstance(rule.do, Notify) and rule.do.to not in channels:
        known = f"Known: {', '.join(sorted(channels))}" if channels else "Name channels in the coordinator's `notify`"
        raise ConfigError("do.to", f"there is no channel {rule.do.to!r}", known)


def cloud_event(id: str, rule: TriggerRule, signal: Signal, now: datetime) -> dict[str, Any]:
    """What is sent: a CloudEvent of the signal's type, whose data are its fields and the text. Pure."""
    fields = {key: value for key, value in signal.fields.items() if key != TRACEPARENT}
    event: dict[str, Any] = {
        "specversion": "1.0",
        "id": id,
        "source": SOURCE,
        "type": signal.type,
        "subject": rule.name,
        "time": now.isoformat().replace("+00:00", "Z"),
        "datacontenttype": "application/json",
        "data": {**fields, "text": text_of(rule, signal)},
    }
    trace = signal.fields.get(TRACEPARENT)
    return {**event, TRACEPARENT: trace} if isinstance(trace, str) else event


class _Text(string.Template):
    idpattern = r"[a-z_][a-z0-9_.]*(?<!\.)"


def text_of(rule: TriggerRule, signal: Signal) -> str:
    """The rule's text with the event's fields; what an event does not have stays as it is written."""
    assert isinstance(rule.do, Notify)
    if rule.do.text:
        shown = {key: _shown(value) for key, value in signal.fields.items()}
        return _Text(rule.do.text).safe_substitute(shown)[:MOST_TEXT]
    listed = ", ".join(f"{k} {_shown(v)}" for k, v in signal.fields.items() if v != "" and k != TRACEPARENT)
    return f"{signal.type}: {listed}"[:MOST_TEXT]


def _shown(value: object) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


async def _send(channel: Channel, event: dict[str, Any]) -> None:
    """Raises ConfigError: it will never take this; anything else may pass."""
    text = event["data"]["text"]
    match channel:
        case Webhook():
            await _post(channel.url_file.read_text(), event, "application/cloudevents+json", _bearer(channel))
        case Slack():
            # https://docs.slack.dev/messaging/formatting-message-text#escaping: else a field could name @everybody.
            escaped = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
            await _post(channel.url_file.read_text(), {"text": escaped}, "application/json", {})
        case Email():
            await asyncio.to_thread(_mail, channel, event)
        case NatsSubject():
            access = Access(channel.credentials, channel.ca_file)
            broker = await Broker.connect(channel.url, "fedtide-notices", access, wait_s=WITHIN_S)
            try:
                await broker.tell(channel.subject, json.dumps(event).encode())
            finally:
                await broker.close()


def _bearer(channel: Webhook) -> dict[str, str]:
    return {"Authorization": f"Bearer {channel.token_file.read_text().strip()}"} if channel.token_file else {}


async def _post(url: str, body: dict[str, Any], kind: str, headers: dict[str, str]) -> None:
    timeout = aiohttp.ClientTimeout(total=WITHIN_S)
    async with (
        aiohttp.ClientSession(trust_env=False, timeout=timeout) as session,
        session.post(
            url.strip(), data=json.dumps(body), headers={"Content-Type": kind, **headers}, allow_redirects=False
        ) as response,
    ):
        if response.status < HTTPStatus.MULTIPLE_CHOICES:
            return
        said = f"status {response.status}"
        if response.status in (HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.TOO_MANY_REQUESTS) or response.status >= 500:
            raise _Answered(said)
        raise ConfigError("the channel", f"refuses: {said}", "See its URL and token")


def _of_a_header(text: str) -> str:
    """One line. A field of an event could else hide a line break in an encoded word, which `email` decodes."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).replace("=?", "?").split())


def _message(channel: Email, event: dict[str, Any]) -> EmailMessage:
    text = event["data"]["text"]
    message = EmailMessage()
    message["From"], message["To"] = channel.sender, ", ".join(channel.to)
    message["Subject"] = _of_a_header(f"fedtide {event['subject']}: {text}")[:150]
    message["Date"] = format_datetime(datetime.now(UTC))
    message["Message-ID"] = f"<{event['id']}.{event['subject']}@fedtide>"
    message["X-Fedtide-Type"] = _of_a_header(event["type"])[:150]
    data = {key: value for key, value in event["data"].items() if key != "text"}
    message.set_content(f"{text}\n\n{json.dumps(data, indent=1)}\n")
    return message


def _session(channel: Email) -> smtplib.SMTP:
    """Connected, encrypted and logged in as the channel says."""
    context = ssl.create_default_context()
    if channel.tls == "tls":
        client: smtplib.SMTP = smtplib.SMTP_SSL(channel.host, channel.port, timeout=WITHIN_S, context=context)
    else:
        client = smtplib.SMTP(channel.host, channel.port, timeout=WITHIN_S)
    try:
        if channel.tls == "starttls":
            client.starttls(context=context)
        if channel.user:
            password = channel.password_file.read_text().strip() if channel.password_file is not None else ""
            client.login(channel.user, password)
    except BaseException:
        client.close()
        raise
    return client


def _mail(channel: Email, event: dict[str, Any]) -> None:
    try:
        client = _session(channel)
        try:
            refused = client.send_message(_message(channel, event))
        finally:
            client.close()  # without a farewell: it has taken the message, or not
    except smtplib.SMTPAuthenticationError as exc:
        if exc.smtp_code < _FINAL:
            raise
        remedy = "See `user` and `password_file`"
        raise ConfigError("the channel", f"refuses its login: {exc.smtp_code}", remedy) from exc
    except smtplib.SMTPRecipientsRefused as exc:
        if all(code < _FINAL for code, _ in exc.recipients.values()):
            raise  # greylisted: it takes them later
        refused = exc.recipients
    if refused:
        raise ConfigError("the channel", f"the server takes nothing for {', '.join(refused)}", "See `to`")


_FINAL = 500
"""Codes of SMTP from here on will be the same tomorrow (RFC 5321, 4.2.1)."""
