"""Sends traces to a collector, as OTLP over HTTP, if one is named; otherwise it costs nothing and loads nothing.

Spans are made of the log's events here (`fedtide.coordinator.tracing`), also those of nodes: a node need not reach a
collector, and its clock need not be right. What a collector does not take is lost, and holds up nothing.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import threading
from collections.abc import Awaitable, Callable, Iterator, Sequence
from importlib import metadata
from importlib.util import find_spec
from typing import TYPE_CHECKING

from fedtide.coordinator.commands import CleanUp, Command, LaunchAggregator, SetDesired, StopAggregator, subject_of
from fedtide.coordinator.config import TraceRules
from fedtide.coordinator.log.engine import Engine
from fedtide.coordinator.state import World
from fedtide.coordinator.tracing.spans import Span, Spans
from fedtide.fabric.errors import ConfigError
from fedtide.fabric.events.envelope import Event
from fedtide.fabric.trace_context import TraceContext, of_offer, within

if TYPE_CHECKING:
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import ReadableSpan
    from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExportResult
    from opentelemetry.trace import SpanContext

log = logging.getLogger(__name__)

TIMEOUT_S = 10.0
CLOSE_WITHIN_S = 2.0
Handler = Callable[[Command], Awaitable[None]]


class Traces:
    """Follows the log from now on, and tells a collector."""

    def __init__(self, engine: Engine, rules: TraceRules, name: str) -> None:
        self._engine = engine
        self._rules = rules
        self._late = ""
        self._sender = _Sender(rules.endpoint, name, self._told) if rules.endpoint else None

    def warnings(self) -> Iterator[str]:
        if self._late:
            yield f"traces are lost: {self._rules.endpoint} {self._late}"

    def around(self, handle: Handler) -> Handler:
        """Carry out commands within the span of their run or roll-out: their messages and log lines name it."""
        if self._sender is None:
            return handle

        async def traced(command: Command) -> None:
            with within(_context_of(command, self._engine.world)):
                await handle(command)

        return traced

    async def keep(self) -> None:
        """For ever."""
        sender, spans = self._sender, Spans()
        if sender is None:
            return
        spans.go_on(self._engine.world)

        def look(event: Event) -> None:
            for span in spans.of(event, self._engine.world):
                sender.send(span)

        try:
            await self._engine.show(look)
        finally:
            await asyncio.to_thread(sender.close)

    def _told(self, wrong: str) -> None:
        """From the sender's thread: what became of a batch."""
        if wrong and not self._late:
            log.warning("traces.lost", extra={"endpoint": self._rules.endpoint, "reason": wrong})
        self._late = wrong


def check(rules: TraceRules) -> None:
    """Raises ConfigError if an endpoint is named and OpenTelemetry is not installed."""
    if rules.endpoint and find_spec("opentelemetry") is None:
        raise ConfigError("traces.endpoint", "needs OpenTelemetry, which is not here", "pip install 'fedtide[traces]'")


def _context_of(command: Command, world: World) -> TraceContext | None:
    match command:
        case SetDesired(node=node, rollout=rollout, counter=counter) if rollout in world.rollouts:
            return of_offer(world.rollouts[rollout].facts.origin.context, node, counter)
        case LaunchAggregator(trace=trace):
            return TraceContext.parse(trace)
        case StopAggregator(run=run) | CleanUp(run=run) if run in world.runs:
            return world.runs[run].facts.origin.context
        case _:
            about = subject_of(command).rpartition("/")[2]
            found = world.runs.get(about) or world.rollouts.get(about)
            return found.facts.origin.context if found is not None else None


class _Sender:
    """Spans as OpenTelemetry's own, through its batches, in its thread."""

    def __init__(self, endpoint: str, name: str, told: Callable[[str], None]) -> None:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExportResult

        logging.getLogger("opentelemetry").setLevel(logging.CRITICAL)  # it logs each failure; `told` says it once

        class Exporter(OTLPSpanExporter):
            def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
                result = super().export(spans)
                told("" if result is SpanExportResult.SUCCESS else "takes none, see its log")
                return result

        self._resource: Resource = Resource.create(
            {
                "service.name": "fedtide",
                "service.instance.id": name,
                "service.version": metadata.version("fedtide"),
                "host.name": socket.gethostname(),
            }
        )
        self._processor: BatchSpanProcessor = BatchSpanProcessor(
            Exporter(endpoint=endpoint, timeout=TIMEOUT_S), schedule_delay_millis=1000
        )

    def send(self, span: Span) -> None:
        self._processor.on_end(_as_opentelemetry(span, self._resource))

    def close(self) -> None:
        """Send what is left, for a moment: a collector that is away delays no successor."""
        ending = threading.Thread(target=self._processor.shutdown, daemon=True)
        ending.start()
        ending.join(CLOSE_WITHIN_S)


def _as_opentelemetry(span: Span, resource: Resource) -> ReadableSpan:
    from opentelemetry.sdk.trace import Event as SpanEvent
    from opentelemetry.sdk.trace import ReadableSpan
    from opentelemetry.trace import Link, Status, StatusCode

    return ReadableSpan(
        span.name,
        _span_context(span.context),
        _span_context(span.parent) if span.parent is not None else None,
        resource,
        attributes=dict(span.about),
        events=[SpanEvent(m.name, dict(m.about), _nanoseconds(m.at.timestamp())) for m in span.moments],
        links=[Link(_span_context(each)) for each in span.links],
        status=Status(StatusCode.ERROR, span.failed) if span.failed else Status(StatusCode.OK),
        start_time=_nanoseconds(span.began.timestamp()),
        end_time=_nanoseconds(max(span.ended, span.began).timestamp()),
    )


def _span_context(context: TraceContext) -> SpanContext:
    from opentelemetry.trace import SpanContext, TraceFlags

    flags = TraceFlags(TraceFlags.SAMPLED if context.sampled else TraceFlags.DEFAULT)
    return SpanContext(int(context.trace, 16), int(context.span, 16), is_remote=False, trace_flags=flags)


def _nanoseconds(seconds: float) -> int:
    return round(seconds * 1e6) * 1000
