"""Events from outside, sent with the CloudEvents SDK over HTTP, and by hand where others send more than the SDK."""

from __future__ import annotations

import base64
import gzip
import json
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest
from cloudevents.core.bindings.http import to_binary_event, to_structured_event
from cloudevents.core.v1.event import CloudEvent

from fedtide.coordinator.conditions import check
from fedtide.fabric.errors import ConfigError
from fedtide.fabric.events.envelope import TriggerApplied
from fedtide.fabric.plans.trigger_rule import TriggerRule
from tests.shell.served_api import Served, served_api

STRUCTURED, BATCH = "application/cloudevents+json", "application/cloudevents-batch+json"


def _rule(name: str, where: str) -> TriggerApplied:
    rule = {"name": name, "on": "com.example.*", "where": where, "do": {"kind": "run", "model": "no-such-model"}}
    return TriggerApplied(rule=TriggerRule.model_validate(rule))


RULES = {
    "size": "size > 10",
    "tags": "'raw' in tags and len(tags) == 2",
    "subject": 'subject == "Euro €"',
    "nested": "sensor.psi > 0.2 and sensor['batch'] == 'k'",
    "dashed": "data['model-name'] == 'digits' and sensor['batch-no'] == 7",
    "element": "records[0].key == '1.parquet'",
}


@pytest.fixture(scope="module")
def api() -> Iterator[Served]:
    with served_api(*(_rule(name, where) for name, where in RULES.items())) as served:
        yield served


def _send(api: Served, body: bytes, headers: dict[str, str], method: str = "POST") -> tuple[int, Any]:
    request = urllib.request.Request(f"{api.url}/v1/events", body or None, headers, method=method)
    try:
        with urllib.request.urlopen(request, timeout=20) as response:
            return response.status, json.loads(response.read() or b"null")
    except urllib.error.HTTPError as exc:
        return exc.code, json.loads(exc.read() or b"null")


def _met(rules: dict[str, str]) -> set[str]:
    """The rules whose condition holds: the first event fires, the rule is busy with it when the next come."""
    assert set(rules.values()) <= {"fired", "busy", "condition", "error"}
    return {name for name, outcome in rules.items() if outcome in ("fired", "busy")}


def _judged(api: Served, event: dict[str, Any]) -> dict[str, str]:
    body = {"specversion": "1.0", "source": "/s", "type": "com.example.x", **event}
    status, said = _send(api, json.dumps(body).encode(), {"Content-Type": STRUCTURED})
    assert status == 202, said
    return dict(said["rules"])


def test_what_the_sdk_sends_is_understood_in_both_modes(api: Served) -> None:
    data = {"size": 11, "tags": ["raw", "eu"], "records": [{"key": "1.parquet"}]}
    for mode in (to_binary_event, to_structured_event):
        attributes = {"type": "com.example.x", "source": "/s", "id": mode.__name__, "subject": "Euro €"}
        message = mode(CloudEvent({**attributes, "specversion": "1.0", "datacontenttype": "application/json"}, data))
        status, said = _send(api, message.body, dict(message.headers))
        assert status == 202, said
        assert _met(said["rules"]) == {"size", "tags", "subject", "element"}, said


def test_any_json_is_data(api: Served) -> None:
    for number, data in enumerate(({"size": 11, "note": None, "rows": [[1], None]}, None, [1, 2], "text", 7)):
        rules = _judged(api, {"id": f"any-{number}", "data": data, "extension": None})
        assert ("size" in _met(rules)) == isinstance(data, dict), rules
    assert _judged(api, {"id": "without"})["size"] == "error", "the event has no field `size`"
    encoded = base64.b64encode(b'{"size": 11}').decode()
    assert "size" in _met(_judged(api, {"id": "b64", "datacontenttype": "application/json", "data_base64": encoded}))


def test_nested_and_dashed_keys_can_be_named(api: Served) -> None:
    data = {"sensor": {"psi": 0.5, "batch": "k", "batch-no": 7}, "model-name": "digits"}
    judged = _judged(api, {"id": "nested", "data": data})
    assert {"nested", "dashed"} <= _met(judged) and judged["element"] == "error"
    for wrong in ("f(x).y > 1", "a[b] > 1", "a[1:2] > 1", "().__class__ > 1"):
        with pytest.raises(ConfigError):
            check("where", wrong)


def test_each_event_of_a_batch_is_judged_and_a_wrong_one_is_named(api: Served) -> None:
    event = {"specversion": "1.0", "source": "/s", "type": "com.example.x", "subject": "Euro €"}
    events = [{**event, "id": "batch-1"}, {**event, "id": "batch-2", "subject": "x"}]
    status, said = _send(api, json.dumps(events).encode(), {"Content-Type": BATCH})
    assert status == 202
    assert ["subject" in _met(each["rules"]) for each in said["events"]] == [True, False]
    status, said = _send(api, json.dumps([*events, {**event, "id": 3}]).encode(), {"Content-Type": BATCH})
    assert (status, said["detail"].split(":")[0]) == (400, "body[2].id")


BINARY = {"ce-specversion": "1.0", "ce-source": "/s", "ce-type": "com.example.x", "ce-id": "1"}


@pytest.mark.parametrize(
    ("headers", "body"),
    [
        ({**BINARY, "ce-subject": "%FF"}, b""),
        ({**BINARY, "ce-specversion": "0.3"}, b""),
        ({k: v for k, v in BINARY.items() if k != "ce-specversion"}, b""),
        ({k: v for k, v in BINARY.items() if k != "ce-source"}, b""),
        ({**BINARY, "ce-id": ""}, b""),
        ({**BINARY, "ce-time": "yesterday"}, b""),
        ({**BINARY, "ce-no_name": "x"}, b""),
        ({**BINARY, "Content-Type": "application/json"}, b"not json"),
        ({"Content-Type": STRUCTURED, "Content-Encoding": "gzip"}, b"not gzip"),
        ({"Content-Type": "application/cloudevents+xml"}, b"<event/>"),
        (
            {"Content-Type": STRUCTURED},
            b'{"specversion":"1.0","id":"1","source":"/s","type":"t","data":1,"data_base64":"MQ=="}',
        ),
        ({"Content-Type": STRUCTURED}, b'{"specversion":"1.0","id":"1","source":"/s","type":"t","ext":{"a":1}}'),
    ],
)
def test_what_is_no_cloud_event_is_refused_with_the_reason(api: Served, headers: dict[str, str], body: bytes) -> None:
    status, said = _send(api, body, headers)
    assert status == 400 and said["detail"], said


def test_data_of_other_kinds_and_compressed_bodies_are_taken(api: Served) -> None:
    headers = {**BINARY, "ce-id": "text", "ce-subject": "Euro%20%E2%82%AC", "Content-Type": "text/plain"}
    assert "subject" in _met(_send(api, b"hello", headers)[1]["rules"])
    event = {"specversion": "1.0", "id": "gz", "source": "/s", "type": "com.example.x", "subject": "Euro €"}
    packed = gzip.compress(json.dumps(event).encode())
    said = _send(api, packed, {"Content-Type": STRUCTURED, "Content-Encoding": "gzip"})[1]
    assert "subject" in _met(said["rules"])


def test_a_sender_that_asks_first_is_told_that_it_may_send(api: Served) -> None:
    request = urllib.request.Request(
        f"{api.url}/v1/events",
        headers={"WebHook-Request-Origin": "eventgrid.azure.net", "WebHook-Request-Rate": "120"},
        method="OPTIONS",
    )
    with urllib.request.urlopen(request, timeout=20) as response:
        assert response.headers["WebHook-Allowed-Origin"] == "eventgrid.azure.net"
        assert response.headers["WebHook-Allowed-Rate"] == "120"
    assert _send(api, b"", {}, "OPTIONS")[0] == 400, "that is no handshake"
