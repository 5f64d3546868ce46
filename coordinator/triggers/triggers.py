"""Trigger rules at work: which signal fires which rule, and why not. Pure.

    (none) --TriggerApplied--> Trigger --signal--> Trigger + Fire(...)
                                  \\\\--TriggerRemoved--> (gone)

For one signal and one rule the outcome is one of: `fired`, `queued`, or why it was not:
`condition`, `error`, `duplicate`, `cooldown`, `budget`, `busy`, `queue full`. A condition that
cannot be evaluated does not fire (fail closed) and says so in the history.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from datetime import datetime

from fedtide.coordinator.commands import Commands, Fire, StopFired
from fedtide.coordinator.conditions import holds
from fedtide.coordinator.decisions import Decisions
from fedtide.fabric.errors import ConfigError
from fedtide.fabric.events.envelope import TYPE_PREFIX
from fedtide.fabric.messages.views import FiringOutcome
from fedtide.fabric.plans.trigger_rule import Notify, Signal, StartRollout, TriggerRule, matches_type
from fedtide.fabric.times import later
from fedtide.fabric.trace_context import TRACEPARENT, TraceContext

HISTORY = 200
REMEMBERED_KEYS = 10_000


@dataclass(frozen=True, slots=True)
class Firing:
    """One firing of a rule; `started` is the id of the run or roll-out that it starts, the same on every replay."""

    signal: Signal
    started: str


@dataclass(frozen=True, slots=True)
class FiringRecord:
    """One line of the history."""

    at: datetime
    signal: str
    type: str
    outcome: FiringOutcome
    reason: str = ""
    started: str = ""


@dataclass(frozen=True, slots=True)
class Trigger:
    """A rule and its records. `active`: the firing whose run or roll-out is not over; `asked`: not started yet."""

    rule: TriggerRule
    fired: int = 0
    last_fired_at: datetime | None = None
    active: str | None = None
    asked: tuple[Firing, ...] = ()
    queue: tuple[Firing, ...] = ()
    stopping: tuple[str, ...] = ()
    keys: tuple[str, ...] = ()
    history: tuple[FiringRecord, ...] = ()


Step = tuple[Trigger, Commands]


def step(state: Trigger, signal: Signal, at: datetime, decisions: Decisions) -> Step:
    """The trigger after one signal."""
    if not matches_type(state.rule, signal.type):
        return state, ()
    about = f"rules/{state.rule.name}/{signal.type}"
    outcome, reason = decisions.replay_or_decide(about, lambda: list(judge(state, signal, at)))
    key = started_id(state.rule, signal) if outcome in ("fired", "queued") else ""
    state = _noted(state, FiringRecord(at, signal.id, signal.type, outcome, reason, key))
    if outcome not in ("fired", "queued"):
        return state, ()
    state = replace(state, keys=(*state.keys, _key(state.rule, signal))[-REMEMBERED_KEYS:])
    firing = Firing(signal, key)
    if outcome == "queued":
        return replace(state, queue=(*state.queue, firing)), ()
    if state.active is not None:
        # It is replaced: it must not start any more, and stops are requested until it has ended.
        state = replace(started(state, state.active), stopping=(*state.stopping, state.active))
    stop = tuple(StopFired(state.rule.name, replaced) for replaced in state.stopping[-1:])
    state, commands = _fire(state, firing, at)
    return state, (*stop, *commands)


def judge(state: Trigger, signal: Signal, at: datetime) -> tuple[FiringOutcome, str]:
    """What a signal of the right type would do now, and why."""
    rule = state.rule
    try:
        if not holds(rule.where, signal.fields):
            return "condition", f"not ({rule.where})"
    except ConfigError as exc:
        return "error", str(exc)
    if rule.dedupe and rule.dedupe not in signal.fields:
        return "error", f"the event has no field {rule.dedupe!r} to tell duplicates by"
    if _key(rule, signal) in state.keys:
        return "duplicate", f"fired for {_key(rule, signal)!r} before"
    limit = rule.most_firings
    if limit is not None and state.fired + len(state.queue) >= limit:
        return "budget", f"all {limit} firings are spent"
    if state.last_fired_at is not None and at < later(state.last_fired_at, rule.cooldown_s):
        return "cooldown", f"fired {(at - state.last_fired_at).total_seconds():.1f} s ago, waits {rule.cooldown_s:g} s"
    return _beside_what_is_active(state)


def _beside_what_is_active(state: Trigger) -> tuple[FiringOutcome, str]:
    rule = state.rule
    if isinstance(rule.do, Notify) and len(state.asked) >= rule.max_queue:
        return "queue full", f"{len(state.asked)} wait already for {rule.do.to}"
    if state.active is None or rule.policy == "replace":
        return "fired", ""
    if rule.policy == "skip":
        return "busy", f"{state.active} is still active"
    if len(state.queue) >= rule.max_queue:
        return "queue full", f"{len(state.queue)} wait already"
    return "queued", f"after {state.active}"


def started(state: Trigger, key: str) -> Trigger:
    """The run or roll-out that the rule asked for exists now: it need not be asked for again."""
    asked = tuple(f for f in state.asked if f.started != key)
    return state if asked == state.asked else replace(state, asked=asked)


def ended(state: Trigger, key: str, at: datetime) -> Step:
    """What the rule started is over: the next firing in the queue starts."""
    state = replace(started(state, key), stopping=tuple(k for k in state.stopping if k != key))
    if state.active != key:
        return state, ()
    state = replace(state, active=None)
    if not state.queue:
        return state, ()
    first, *rest = state.queue
    return _fire(replace(state, queue=tuple(rest)), first, at)


def failed(state: Trigger, key: str, reason: str, at: datetime) -> Step:
    """What the rule asked for cannot be started: record that, and start the next firing in the queue."""
    return ended(_noted(state, FiringRecord(at, "", state.rule.type, "failed", reason, key)), key, at)


def pending_commands(state: Trigger) -> Commands:
    """Ask again for what was fired and is not known to have started, and for stops that are not done."""
    stops = tuple(StopFired(state.rule.name, key) for key in state.stopping)
    return (*stops, *(_start(state.rule, f) for f in state.asked))


def started_id(rule: TriggerRule, signal: Signal) -> str:
    """The id of the run or roll-out that this rule starts for this signal; always the same."""
    digest = hashlib.sha256(f"{rule.name}/{_key(rule, signal)}".encode()).hexdigest()[:10]
    return f"{_PREFIXES.get(rule.do.kind, 'run')}-{digest}"


_PREFIXES = {"rollout": "rollout", "notify": "notice"}


def _fire(state: Trigger, firing: Firing, at: datetime) -> Step:
    active = state.active if isinstance(state.rule.do, Notify) else firing.started  # nothing waits for a notice
    fired = replace(state, fired=state.fired + 1, last_fired_at=at, active=active, asked=(*state.asked, firing))
    return fired, (_start(state.rule, firing),)


def _start(rule: TriggerRule, firing: Firing) -> Fire:
    """A roll-out that a release has fired is of that release, however long it waited."""
    do, about = rule.do, firing.signal.fields
    if isinstance(do, StartRollout) and about.get("model") == do.model and "version" in about:
        pinned = do.model_copy(update={"plan": {"version": about["version"], **do.plan}})
        rule = rule.model_copy(update={"do": pinned})
    return Fire(rule, firing.started, _cause(firing), firing.signal, _trace(rule, firing.signal))


def _trace(rule: TriggerRule, signal: Signal) -> str:
    """A roll-out belongs to the trace of the run that made its release. A run begins one of its own, unless an event
    from outside says which it belongs to: what starts itself again and again would never end a trace.
    """
    if signal.type.startswith(TYPE_PREFIX) and not isinstance(rule.do, StartRollout):
        return ""
    context = TraceContext.parse(signal.fields.get(TRACEPARENT))
    return str(context) if context is not None else ""


def _cause(firing: Firing) -> str:
    return f"{firing.signal.type} {firing.signal.id}"


def _key(rule: TriggerRule, signal: Signal) -> str:
    return f"{rule.dedupe}={signal.fields.get(rule.dedupe)}" if rule.dedupe else signal.id


def _noted(state: Trigger, line: FiringRecord) -> Trigger:
    return replace(state, history=(*state.history, line)[-HISTORY:])
