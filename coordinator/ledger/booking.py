"""What each event adds to the ledger. Pure.

What nodes say of themselves is bounded by what they can have used: their cores and memory, since they were asked.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

from immutables import Map

from fedtide.coordinator.ledger.accounts import NOBODY, USEFUL, Answer, Entry, Place, quantities
from fedtide.fabric.events.costs import UsageReported
from fedtide.fabric.events.envelope import Event, ReleasePublished
from fedtide.fabric.events.rollouts import NodePhaseReported, RegionCached, RolloutStarted
from fedtide.fabric.events.runs import (
    AggregatorExited,
    RoundAbandoned,
    RoundClosed,
    RoundOpened,
    RunCompleted,
    RunFailed,
    RunRequested,
    RunResumeRequested,
    UpdateReceived,
    UpdateRefused,
)
from fedtide.fabric.messages.usage import Usage
from fedtide.fabric.plans.prices import Meter
from fedtide.fabric.plans.run_spec import RunSpec

AGGREGATORS = "aggregators"
"""The pool of all aggregators."""


@dataclass(frozen=True, slots=True)
class NodeFacts:
    """What the fleet knows of a node."""

    region: str
    pool: str
    cpus: int
    memory_bytes: int


@dataclass(frozen=True, slots=True)
class Where:
    """What an event alone does not say.

    `is_news`: whether it changed what it is about: a report may come again. `works`: whether the run has an aggregator.
    """

    node: Callable[[str], NodeFacts | None]
    release_bytes: Callable[[str], int]
    """Of the release that a roll-out offers."""
    asked_at: Callable[[int, str], datetime | None] = lambda _, __: None
    """When the nodes of a phase of a round were asked."""
    is_news: bool = True
    works: bool = True
    is_region: Callable[[str], bool] = lambda _: True


def subject(event: Event) -> str:
    """The run or roll-out whose account an event belongs to; NOBODY: none."""
    data = event.data
    if isinstance(data, ReleasePublished):
        return data.manifest.lineage.run
    return str(getattr(data, "run", "") or getattr(data, "rollout", "") or NOBODY)


@dataclass(frozen=True, slots=True)
class Context:
    """The account, and what an event's data alone does not say."""

    entry: Entry
    at: datetime
    where: Where

    @property
    def hour(self) -> int:
        return int(self.at.timestamp()) // 3600


def book(entry: Entry, event: Event, where: Where) -> None:
    """Add to an account what this event means."""
    books = BOOKS.get(type(event.data))
    if books is not None:
        books(Context(entry, event.time, where), event.data)


def tags_of_run(run: str, spec: RunSpec, by: str) -> dict[str, str]:
    own = {f"label.{name}": value for name, value in spec.labels.items()}
    named = {"run": run, "app": spec.app.name, "by": by, "purpose": spec.purpose}
    return {**named, **({"model": spec.model} if spec.model else {}), **own}


def pool_of(labels: Mapping[str, str], hardware: str) -> str:
    """The pool of a node: its label `pool`, or its hardware class, as text without a slash."""
    return re.sub(r"[^A-Za-z0-9_.-]", "-", labels.get("pool") or hardware)[:63]


def _run_requested(context: Context, data: RunRequested) -> None:
    context.entry.tag(**tags_of_run(data.run, data.spec, data.by))


def _rollout_started(context: Context, data: RolloutStarted) -> None:
    release = f"{data.plan.model} v{data.plan.version}"
    context.entry.tag(rollout=data.rollout, model=data.plan.model, release=release, by=data.by)


def _run_resumed(context: Context, data: RunResumeRequested) -> None:
    context.entry.tag(ended="")


def _round_opened(context: Context, data: RoundOpened) -> None:
    if not context.where.is_news:  # the next attempt tells what is out, and sends it to nobody
        return
    used: dict[Meter, int] = {"wan_down": data.wan_bytes, "wan_avoided": max(data.bytes_down - data.wan_bytes, 0)}
    context.entry.add(Place(context.hour, data.round, phase=_phase(data.phase)), used)


def _update_received(context: Context, data: UpdateReceived) -> None:
    if _is_closed(context, data.round):
        return
    used: dict[Meter, int] = {
        "updates": int(_phase(data.phase) == "train"),
        "wan_up": 0 if data.stays else max(data.bytes_up, 0),
    }
    _answer(context, data, USEFUL, used)


def _update_refused(context: Context, data: UpdateRefused) -> None:
    _answer(context, data, data.category, {"wan_up": data.bytes_up})


def _answer(context: Context, data: UpdateReceived | UpdateRefused, outcome: str, also: Mapping[Meter, int]) -> None:
    key, entry = f"{data.phase}/{data.node}", context.entry
    before = entry.account.answers.get(key)
    if before is not None and before.place.round == data.round and (not data.usage or data.usage == before.told):
        # It was reported before: by an aggregator that died, by a trial that was abandoned, or as received, and is
        # taken back.
        entry.move(key, outcome)
        return
    facts, asked_at = context.where.node(data.node), context.where.asked_at(data.round, data.phase)
    seconds = max((context.at - asked_at).total_seconds(), 0.0) if asked_at is not None else 0.0
    usage = data.usage.at_most(seconds, facts.cpus, facts.memory_bytes) if facts is not None else Usage()
    used = {meter: quantity for meter, quantity in {**quantities(usage), **also}.items() if quantity}
    region, pool = (facts.region, facts.pool) if facts is not None else ("", "")
    if used:
        place = Place(context.hour, data.round, region, pool, _phase(data.phase), outcome)
        entry.answered(key, Answer(place, used, data.usage))


def _round_abandoned(context: Context, data: RoundAbandoned) -> None:
    for key, answer in context.entry.account.answers.items():
        if answer.place.round == data.round and answer.place.outcome == USEFUL:
            context.entry.move(key, "abandoned")


def _round_closed(context: Context, data: RoundClosed) -> None:
    answers = context.entry.account.answers
    context.entry.set(answers=Map({k: a for k, a in answers.items() if a.place.round != data.round}))
    place = Place(context.hour, data.round)
    _aggregated(context.entry, place, data.attempt, data.usage)
    if context.where.is_news:
        for region, usage in data.regional.items():
            if not context.where.is_region(region):
                continue  # an aggregator could make up any number
            context.entry.add(_aggregating(replace(place, region=region)), quantities(usage))
    if data.round and not _is_closed(context, data.round):
        context.entry.add(_aggregating(place), {"rounds": 1})


def _is_closed(context: Context, number: int) -> bool:
    """Whether a round was closed lately. An aggregator that died before it stored that closes it again."""
    places = (_aggregating(Place(hour, number)) for hour in (context.hour, context.hour - 1))
    return any(place.line("rounds").key in context.entry.account.lines for place in places)


def _run_over(context: Context, data: RunCompleted | RunFailed) -> None:
    _aggregated(context.entry, Place(context.hour), data.attempt, data.usage)


def _aggregator_exited(context: Context, data: AggregatorExited) -> None:
    # One that was paused or cancelled was asked to end.
    why = USEFUL if not (data.code and context.where.works) else "preempted" if data.preempted else "crashed"
    reported, whole = context.entry.account.aggregators.get(str(data.attempt), (0, 0))
    _cpu(context.entry, Place(context.hour, outcome=why), data.attempt, reported, max(whole, data.usage.cpu_us))


def _released(context: Context, data: ReleasePublished) -> None:
    context.entry.tag(release=f"{data.manifest.model} v{data.manifest.version}")
    context.entry.add(_aggregating(Place(context.hour)), {"releases": 1})


def _region_cached(context: Context, data: RegionCached) -> None:
    context.entry.add(Place(context.hour, region=data.region, phase="distribute"), {"wan_down": data.wan_bytes})


def _node_phase(context: Context, data: NodePhaseReported) -> None:
    if not context.where.is_news:
        return
    facts = context.where.node(data.node)
    region, pool = (facts.region, facts.pool) if facts is not None else ("", "")
    whole = context.where.release_bytes(data.rollout)
    used: dict[Meter, int] = {"wan_down": min(data.wan_bytes, whole)}
    if data.phase == "confirmed":
        used |= {"nodes_updated": 1, "wan_avoided": max(whole - data.wan_bytes, 0)}
    context.entry.add(Place(context.hour, 0, region, pool, "distribute"), used)


def _usage_reported(context: Context, data: UsageReported) -> None:
    for item in data.items:
        place = Place(context.hour, 0, item.region, item.pool, item.phase, item.wasted or USEFUL)
        more: dict[Meter, int] = {"inferences": item.inferences, "stored": item.stored_kb_s}
        context.entry.add(place, {**quantities(item.usage), **more})


def _aggregating(place: Place) -> Place:
    return replace(place, pool=AGGREGATORS, phase="aggregate")


def _aggregated(entry: Entry, place: Place, attempt: int, usage: Usage) -> None:
    reported, whole = entry.account.aggregators.get(str(attempt), (0, 0))
    _cpu(entry, place, attempt, reported + usage.cpu_us, whole)
    entry.add(_aggregating(place), {**quantities(usage), "cpu": 0})


def _cpu(entry: Entry, place: Place, attempt: int, reported: int, whole: int) -> None:
    """Book what is new of an aggregator's CPU time: its end may be known before its last reports are."""
    before = max(entry.account.aggregators.get(str(attempt), (0, 0)))
    entry.set(aggregators=entry.account.aggregators.set(str(attempt), (reported, whole)))
    entry.add(_aggregating(place), {"cpu": max(max(reported, whole) - before, 0)})


def _phase(name: str) -> str:
    """Actions of an app (`train.<action>`) are of the kind that they begin with."""
    kind = name.partition(".")[0]
    return kind if kind in ("train", "evaluate") else "other"


BOOKS: Mapping[type, Callable[[Context, Any], None]] = {
    AggregatorExited: _aggregator_exited,
    NodePhaseReported: _node_phase,
    RegionCached: _region_cached,
    ReleasePublished: _released,
    RolloutStarted: _rollout_started,
    RoundAbandoned: _round_abandoned,
    RoundClosed: _round_closed,
    RoundOpened: _round_opened,
    RunCompleted: _run_over,
    RunFailed: _run_over,
    RunRequested: _run_requested,
    RunResumeRequested: _run_resumed,
    UpdateReceived: _update_received,
    UpdateRefused: _update_refused,
    UsageReported: _usage_reported,
}
"""What events mean to the ledger; others mean nothing to it."""
