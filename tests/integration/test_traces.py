"""One trace from the event that fired a rule to the node that serves what came of it, as a collector gets it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status

from fedtide.console import endpoints
from fedtide.console.cli.try_command import LINE
from tests.conftest import APPS
from tests.integration.conftest import bring_up
from tests.integration.installation import Installation, until
from tests.integration.otlp_receiver import Receiver, attributes, receiving

CALLER = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
"""The example of the specification, https://www.w3.org/TR/trace-context/#examples-of-http-traceparent-headers."""

RULES = f"""\
name: train
on: com.example.news
do: {{kind: run, app: {LINE}, model: line, rounds: 2}}
---
name: spread
on: dev.fedtide.release.published
where: model == "line"
do: {{kind: rollout, model: line, canary: 1.0}}
"""


@pytest.fixture(scope="module")
def collector() -> Iterator[Receiver]:
    with receiving() as there:
        yield there


@pytest.fixture(scope="module")
def traced(collector: Receiver, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Installation]:
    there = bring_up(
        tmp_path_factory.mktemp("traced"), "eu", 2, "--coordinator-set", f"traces={{endpoint: {collector.url}}}"
    )
    yield there
    there.run("down")


def _above(span: Span, trace: dict[bytes, Span]) -> list[str]:
    """Names from the span up to the first one."""
    names = [span.name]
    while span.parent_span_id in trace:
        span = trace[span.parent_span_id]
        names.append(span.name)
    return names


def test_one_trace_leads_from_the_event_to_the_nodes(traced: Installation, collector: Receiver, tmp_path: Path) -> None:
    for number, text in enumerate(RULES.split("---\n")):
        (tmp_path / f"{number}.yaml").write_text(text)
        done = traced.run("trigger", "apply", str(tmp_path / f"{number}.yaml"))
        assert done.returncode == 0, done.stderr
    event = {"specversion": "1.0", "id": "n1", "source": "shop", "type": "com.example.news", "traceparent": CALLER}
    traced.client.send(endpoints.send_event(json.dumps(event).encode()))
    until(lambda: bool([r for r in traced.rollouts() if r.state == "completed"]), "the roll-out")
    (rollout,) = traced.rollouts()
    (run,) = traced.runs()
    until(lambda: len(collector.named(f"roll-out {rollout.rollout}")) == 1, "its span")

    trace_id, caller = (bytes.fromhex(part) for part in CALLER.split("-")[1:3])
    (node,) = collector.named("node eu-1")
    trace = collector.trace(node)
    assert node.trace_id == trace_id
    up = _above(node, trace)
    assert up == ["node eu-1", f"roll-out {rollout.rollout}", "trigger spread", f"run {run.run}", "trigger train"]
    (first,) = [span for span in trace.values() if span.name == "trigger train"]
    assert first.parent_span_id == caller

    assert [e.name for e in node.events][-1] == "confirmed"
    (answer, *_) = [s for s in trace.values() if s.name == "answer eu-1"]
    assert _above(answer, trace)[1] in ("train", "evaluate") and _above(answer, trace)[2].startswith("round ")
    rounds = {s.name: attributes(s) for s in trace.values() if s.name.startswith("round ")}
    assert "round 1" in rounds and "round 2" in rounds
    assert any(key.startswith("fedtide.metric.") for key in rounds["round 2"])
    for span in trace.values():
        assert span.start_time_unix_nano <= span.end_time_unix_nano
        assert span.parent_span_id in trace or span is first, span.name
    counted = Counter((s.name, s.span_id) for s in collector.spans)
    assert not [name for (name, _), times in counted.items() if times > 1]

    folder = traced.home / "coordinator" / "runs" / run.run
    logs = [
        traced.home / "logs" / "agent-eu-1.log",
        traced.home / "logs" / "coordinator.log",
        folder / "aggregator.log",
    ]
    for log in logs:
        assert f"trace_id={trace_id.hex()}" in log.read_text(), log


def test_what_a_person_starts_is_a_trace_and_a_refused_answer_is_an_error_in_it(
    traced: Installation, collector: Receiver
) -> None:
    view = traced.train(APPS / "faulty", "--set", "mode=raise")
    until(lambda: bool(collector.named(f"run {view.run}")), "its span")
    (span,) = collector.named(f"run {view.run}")
    trace = collector.trace(span)
    assert not span.parent_span_id
    refused = [s for s in trace.values() if s.status.code == Status.STATUS_CODE_ERROR and s.name == "answer eu-1"]
    assert refused and all("app_error" in s.status.message for s in refused)
