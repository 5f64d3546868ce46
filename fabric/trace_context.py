"""Which trace something belongs to, as W3C's `traceparent` says it.

https://www.w3.org/TR/trace-context/#traceparent-header. The ids of our own spans are derived from the names of what
they are about: every process, and every coordinator that takes over, comes to the same ones without being told.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

TRACEPARENT = "traceparent"
"""Name of the header, in HTTP and in NATS, and of the CloudEvents extension."""
_FORM = re.compile(r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")
_SAMPLED = 1


@dataclass(frozen=True, slots=True)
class TraceContext:
    """`trace`: 32 hexadecimal digits, `span`: 16. `sampled`: whether whoever began the trace keeps it."""

    trace: str
    span: str
    sampled: bool = True

    @classmethod
    def parse(cls, text: object) -> TraceContext | None:
        """What a header says; None if it is none: a broken one must not be passed on (section 3.2.2.3)."""
        found = _FORM.fullmatch(text.strip()) if isinstance(text, str) else None
        if found is None:
            return None
        version, trace, span, flags, more = found.groups()
        if version == "ff" or (version == "00" and more) or not int(trace, 16) or not int(span, 16):
            return None
        return cls(trace, span, bool(int(flags, 16) & _SAMPLED))

    @classmethod
    def begun_by(cls, *about: object) -> TraceContext:
        """The first span of a trace of its own."""
        return cls(_digest(about, 16), _digest(("span", *about), 8))

    def child(self, *about: object) -> TraceContext:
        """A span of the same trace."""
        return TraceContext(self.trace, _digest((self.span, *about), 8), self.sampled)

    def __str__(self) -> str:
        return f"00-{self.trace}-{self.span}-{int(self.sampled):02x}"


def _digest(about: tuple[object, ...], size: int) -> str:
    return hashlib.blake2b("\0".join(map(str, about)).encode(), digest_size=size).hexdigest()


_CURRENT: ContextVar[TraceContext | None] = ContextVar("trace", default=None)


def current() -> TraceContext | None:
    """The span that this task works for, if it is traced."""
    return _CURRENT.get()


@contextmanager
def within(context: TraceContext | None) -> Iterator[None]:
    """Work for a span: log lines and messages name it."""
    token = _CURRENT.set(context)
    try:
        yield
    finally:
        _CURRENT.reset(token)


def enter(context: TraceContext | None) -> None:
    """Work for a span from here on: a process that does nothing else."""
    _CURRENT.set(context)


@dataclass(frozen=True, slots=True)
class Origin:
    """What began a run or a roll-out. `led`: a `traceparent` that came with it."""

    key: str
    by: str
    led: str = ""

    @property
    def parent(self) -> TraceContext | None:
        return TraceContext.parse(self.led)

    @property
    def firing(self) -> TraceContext | None:
        """The span of the rule that fired, if it was one."""
        if not self.by.startswith("trigger "):
            return None
        return self.parent.child("trigger", self.key) if self.parent else TraceContext.begun_by("trigger", self.key)

    @property
    def context(self) -> TraceContext:
        """The span of the run or roll-out itself."""
        above = self.firing or self.parent
        return above.child(self.key) if above is not None else TraceContext.begun_by(self.key)


def of_answer(run: TraceContext, round: int, trial: int, phase: str, node: str) -> TraceContext:
    """The span of what one node is asked in one phase of a round."""
    return run.child("answer", round, trial, phase, node)


def of_offer(rollout: TraceContext, node: str, counter: int) -> TraceContext:
    """The span of what one node does about one desired state."""
    return rollout.child("node", node, counter)
