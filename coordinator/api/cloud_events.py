"""CloudEvents 1.0 over HTTP, as events come in from outside: binary, structured and batch mode. Pure.

https://github.com/cloudevents/spec/blob/v1.0.2/cloudevents/spec.md, formats/json-format.md and
bindings/http-protocol-binding.md; the handshake of webhooks is section 4 of http-webhook.md.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from datetime import datetime
from typing import Any
from urllib.parse import unquote

from pydantic import ValidationError

from fedtide.coordinator.api.http import parse_json
from fedtide.fabric.errors import ConfigError
from fedtide.fabric.plans.trigger_rule import FieldValue, Signal
from fedtide.fabric.validation import config_error

STRUCTURED, BATCH = "application/cloudevents+json", "application/cloudevents-batch+json"
MOST_FIELDS = 1000
"""Of larger data, the first fields can be used in conditions."""
MOST_EVENTS = 1000
_HOW = f"Send {STRUCTURED}, {BATCH}, or ce-id, ce-source, ce-type and ce-specversion headers"
_NAME = re.compile(r"[a-z0-9]{1,255}")
_JSON_TYPE = re.compile(r"(?:[^;]+/)?(?:[^;]+\+)?json(?:\s*;.*)?", re.IGNORECASE)
_BY_DEFAULT = ("", "application/octet-stream", "application/x-www-form-urlencoded")
"""What clients say of a body that they were told nothing of."""
_REQUIRED = ("id", "source", "type")
_CONTEXT = ("id", "type", "specversion", "datacontenttype", "data", "data_base64")


def read_signals(content_type: str, headers: Mapping[str, str], body: bytes) -> list[Signal]:
    """The events of one request.

    Raises:
        ConfigError: no CloudEvents 1.0, with the event and the attribute that is wrong.
    """
    kind = content_type.partition(";")[0].strip().lower()
    if kind == BATCH:
        return list(_batch(body))
    if kind == STRUCTURED:
        return [_signal(_object("body", parse_json("body", body)), "")]
    if kind.startswith("application/cloudevents"):
        raise ConfigError("Content-Type", f"{kind} is a format that is not read here", _HOW)
    return [_binary(headers, body)]


def _batch(body: bytes) -> Iterator[Signal]:
    events = parse_json("body", body)
    if not isinstance(events, list):
        raise ConfigError("body", "a batch is a JSON array of events", _HOW)
    if len(events) > MOST_EVENTS:
        raise ConfigError("body", f"holds {len(events)} events", f"Send at most {MOST_EVENTS} in one batch")
    for number, event in enumerate(events):
        yield _signal(_object(f"body[{number}]", event), f"body[{number}].")


def _binary(headers: Mapping[str, str], body: bytes) -> Signal:
    """Attributes are headers, percent-encoded (section 3.1.3.2), the body is the data."""
    event: dict[str, Any] = {}
    for name, value in headers.items():
        if name.lower().startswith("ce-"):
            try:
                event[name[3:].lower()] = unquote(value, errors="strict")
            except UnicodeError as exc:
                raise ConfigError(name, "is not UTF-8", "Write characters beyond ASCII percent-encoded") from exc
    kind = next((value for name, value in headers.items() if name.lower() == "content-type"), "")
    if body and _JSON_TYPE.fullmatch(kind.strip()):
        event["data"] = parse_json("data", body)
    elif body and kind.partition(";")[0].strip().lower() in _BY_DEFAULT:
        with suppress(ConfigError):
            event["data"] = parse_json("data", body)
    return _signal(event, "")


def _signal(event: dict[str, Any], path: str) -> Signal:
    attributes = {name: value for name, value in event.items() if value is not None}  # null: unset (JSON, 2.2)
    if attributes.get("specversion") != "1.0":
        raise ConfigError(f"{path}specversion", f"must be '1.0', not {attributes.get('specversion')!r}", _HOW)
    for name in _REQUIRED:
        if not isinstance(attributes.get(name), str) or not attributes[name]:
            raise ConfigError(f"{path}{name}", "every CloudEvent has one, and it is text", _HOW)
    data = _data(attributes, path)
    plain = {name: value for name, value in attributes.items() if name not in _CONTEXT}
    for name, value in plain.items():
        _check_attribute(name, value, path)
    fields: dict[str, FieldValue] = dict(plain)
    if isinstance(data, dict):
        for name, found in _flat(data, ""):
            if len(fields) >= MOST_FIELDS:
                break
            fields[name] = found
    try:
        # Source and id together are the identity (spec, 3.1.1).
        return Signal(id=f"{attributes['source']}#{attributes['id']}", type=attributes["type"], fields=fields)
    except ValidationError as exc:
        raise config_error(exc, Signal, f"{path}event") from exc


def _check_attribute(name: str, value: object, path: str) -> None:
    if not _NAME.fullmatch(name):
        raise ConfigError(f"{path}{name}", "is no name of an attribute: lower-case letters and digits (spec, 3.1)")
    if not isinstance(value, str | bool | int):
        raise ConfigError(f"{path}{name}", "an attribute is a text, a boolean or an integer (JSON format, 2.2)")
    if name == "time":
        try:
            moment = datetime.fromisoformat(str(value).upper())
        except ValueError:
            moment = None
        if moment is None or moment.tzinfo is None:
            raise ConfigError(f"{path}time", f"{value!r} is no time of RFC 3339", "For example 2026-01-01T00:00:00Z")
    if name in ("subject", "dataschema") and not (isinstance(value, str) and value):
        raise ConfigError(f"{path}{name}", "must be a text that is not empty")


def _data(attributes: dict[str, Any], path: str) -> Any:
    """The event's data, if it is JSON; None if it is anything else, which no condition can name."""
    encoded, kind = attributes.get("data_base64"), attributes.get("datacontenttype", "application/json")
    if encoded is None:
        return attributes.get("data")
    if "data" in attributes:
        raise ConfigError(f"{path}data_base64", "stands beside `data`: an event has one of them")
    try:
        raw = base64.b64decode(encoded, validate=True)
    except (binascii.Error, TypeError, ValueError) as exc:
        raise ConfigError(f"{path}data_base64", "is not base64") from exc
    if not isinstance(kind, str) or not _JSON_TYPE.fullmatch(kind.strip()):
        return None
    return parse_json(f"{path}data_base64", raw)


def _flat(value: Any, name: str) -> Iterator[tuple[str, FieldValue]]:
    """Plain values by dotted name. A list of them is a field, and so is each of its elements; nulls are left out."""
    match value:
        case dict():
            for key, inner in value.items():
                yield from _flat(inner, f"{name}.{key}" if name else key)
        case list():
            if all(isinstance(each, bool | int | float | str) for each in value):
                yield name, value
            for number, inner in enumerate(value):
                yield from _flat(inner, f"{name}.{number}")
        case bool() | int() | float() | str():
            yield name, value


def _object(path: str, value: object) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ConfigError(path, "must be a JSON object", _HOW)
    return value
