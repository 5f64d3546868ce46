"""Why things are as they are: the present state, and the events that led to it, each as a sentence. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator

from fedtide.coordinator.rollouts import views as rollout_views
from fedtide.coordinator.runs import rounds, runs, selection
from fedtide.coordinator.state import World
from fedtide.fabric.errors import NotFound
from fedtide.fabric.events.envelope import (
    AlarmRang,
    Event,
    FiringFailed,
    ModelProduced,
    NodeJoined,
    NodeOffline,
    NodeOnline,
    NotificationSent,
    ReleaseAttested,
    ReleasePublished,
    SignalReceived,
    TriggerApplied,
)
from fedtide.fabric.events.identity import NodeQuarantined, OrderRefused, TrustPublished, TrustVouched
from fedtide.fabric.events.rollouts import NodeMeasured, NodePhaseReported, QueryAnswered, RegionCached, RolloutStarted
from fedtide.fabric.events.runs import (
    AggregatorExited,
    AggregatorStarted,
    AggregatorWaits,
    RoundAbandoned,
    RoundClosed,
    RoundCollected,
    RoundOpened,
    RoundsRestarted,
    RoundWaits,
    RunCancelRequested,
    RunCompleted,
    RunFailed,
    RunPauseRequested,
    RunRequested,
    RunResumeRequested,
    RunStopRequested,
    UpdateReceived,
    UpdateRefused,
)
from fedtide.fabric.events.tenants import QuotaSet, TenantAdded, TenantChanged, TenantForgotten, TenantRemoved
from fedtide.fabric.messages.views import HistoryEntry


def present(world: World, name: str, number: int | None) -> list[str]:
    """The present state of the run, round, roll-out, node, model or rule of this name, the reason first.

    Raises:
        NotFound: there is no such run, round, roll-out, node, model or rule.
    """
    if name in world.runs:
        run = world.runs[name]
        return list(_run(world, run) if number is None else _round(world, run, number))
    for table, describe in (
        (world.nodes, _node),
        (world.rollouts, _rollout),
        (world.models, _model),
        (world.triggers, _rule),
    ):
        if name in table:
            if number is not None:
                raise NotFound(f"{name} is no run, and only runs have rounds", f"See `fedtide why {name}`")
            return list(describe(world, name))
    near = ", ".join([*list(world.runs)[-4:], *list(world.rollouts)[-2:], *sorted(world.nodes)[:4]]) or "none yet"
    remedy = f"Known: {near}. A round is RUN/NUMBER"
    raise NotFound(f"there is no run, roll-out, node, model or rule {name!r}", remedy)


def _rollout(world: World, name: str) -> Iterator[str]:
    view = rollout_views.rollout(world.rollouts[name])
    yield f"{view.state}" + (f": {view.reason}" if view.reason else "")
    yield f"{view.model} v{view.version}, started by {view.by}"
    for region in view.regions:
        phases = ", ".join(f"{count} {phase}" for phase, count in sorted(region.phases.items())) or "not begun"
        yield f"{region.region}: {region.state}, {phases}"
        yield from (f"{region.region}: gate {g.gate}, {g.outcome}: {g.reason}" for g in region.gates)
        yield from (f"{region.region}: {node}: {why}" for node, why in sorted(region.reasons.items()))


def _model(world: World, name: str) -> Iterator[str]:
    model, latest = world.models[name], world.models[name].latest
    if latest is None:
        yield "it has no release yet"
    else:
        lineage = latest.manifest.lineage
        yield f"latest release: v{latest.manifest.version}, from {lineage.run} with {lineage.updates} updates"
    if model.producing:
        yield f"a release is being made of {', '.join(produced.run for produced, _ in model.producing)}"
    serving = Counter(ref.digest[:12] for ref in world.serving.get(name, {}).values())
    yield from (f"{count} nodes serve release {digest}" for digest, count in serving.most_common())


def _rule(world: World, name: str) -> Iterator[str]:
    trigger = world.triggers[name]
    where = f" where {trigger.rule.where}" if trigger.rule.where else ""
    yield f"fires on {trigger.rule.type}{where}; it fired {trigger.fired} times"
    if trigger.active is not None:
        yield f"{trigger.active} is still active, {len(trigger.queue)} firings wait"
    for line in trigger.history[-5:]:
        yield f"{line.at:%Y-%m-%d %H:%M:%S} {line.outcome}" + (f": {line.reason}" if line.reason else "")


def _run(world: World, run: runs.Run) -> Iterator[str]:
    match run:
        case runs.Ended(outcome=outcome, reason=reason):
            yield f"{outcome}: {reason or 'every round is closed'}"
        case runs.Paused(reason=reason):
            yield f"paused: {reason}"
        case runs.Running(attempt=attempt, reason=reason):
            yield f"running, attempt {attempt}" + (f": {reason}" if reason else "")
            yield from list(_round(world, run, max(run.rounds)))[:1] if run.rounds else []
    yield f"started by {run.facts.by}" + (f", because of {run.facts.cause}" if run.facts.cause else "")
    rule = world.triggers.get(run.facts.by.removeprefix("trigger "))
    if rule is not None and run.facts.by.startswith("trigger "):
        yield f"the rule fires on {rule.rule.type}" + (f" where {rule.rule.where}" if rule.rule.where else "")


def _round(world: World, run: runs.Run, number: int) -> Iterator[str]:
    state = run.rounds.get(number)
    if state is None:
        raise NotFound(
            f"run {run.facts.run} has no round {number}",
            f"It has {', '.join(map(str, sorted(run.rounds))) or 'none yet'}",
        )
    yield f"round {number}, trial {state.trial}: {type(state).__name__.lower()}" + _detail(state)
    yield from (f"an earlier trial was abandoned: {why}" for why in state.before)
    asked = state.phases["train"].asked if "train" in state.phases else frozenset()
    for phase, tally in state.phases.items():
        for node in sorted(tally.awaited):
            yield f"{phase}: waits for {node}"
        for node, refused in sorted(tally.refused.items()):
            yield f"{phase}: {node} does not count, {refused.category}: {refused.reason}"
    for node in sorted(set(world.nodes) - asked):
        why = selection.why_not(world.nodes[node], run.facts.spec)
        yield f"{node} was not asked" + (f" (now: {why})" if why else "")


def _detail(state: rounds.Round) -> str:
    match state:
        case rounds.Abandoned(reason=reason):
            return f", {reason}"
        case rounds.Closed(phases=phases) if "train" in phases and phases["train"].cause:
            return f", {phases['train'].cause}"
        case rounds.Open() | rounds.Collecting() | rounds.Aggregating():
            tally = state.phases.get(state.phase, rounds.Tally())
            rung = f", its alarm has rung: {tally.rang}" if tally.rang else ""
            return f", {state.phase}: {len(tally.received)} of {len(tally.asked)} answered{rung}"
        case _:
            return ""


def _node(world: World, name: str) -> Iterator[str]:
    node = world.nodes[name]
    yield f"online since {node.since:%Y-%m-%d %H:%M:%S}" if node.online else f"offline: {node.reason}"
    for key, run in world.active_runs():
        if name in runs.awaited(run):
            yield f"has a task of {key}"
    for model, serving in sorted(world.serving.items()):
        if name in serving:
            yield f"serves release {serving[name].digest[:12]} of {model}"
    for rollout in world.rollouts.values():
        if line := rollout_views.why(rollout, name):
            yield line


def history(events: Iterable[Event], name: str, number: int | None) -> list[HistoryEntry]:
    """The events that are about something, as sentences."""
    return [
        HistoryEntry(at=event.time, event=event.id, what=sentence(event))
        for event in events
        if _is_about(event, name, number)
    ]


def names_of(event: Event) -> frozenset[str]:
    """Every run, roll-out, node, model and rule that an event is about."""
    data = event.data
    named = {getattr(data, field, None) for field in ("run", "rollout", "node", "model", "name", "id")}
    match data:
        case ReleasePublished(manifest=manifest):
            named.add(manifest.model)
        case RolloutStarted(plan=plan):
            named.add(plan.model)
        case TriggerApplied(rule=rule):
            named.add(rule.name)
        case FiringFailed(rule=rule_name) | NotificationSent(rule=rule_name):
            named.add(rule_name)
        case RunRequested(by=by, spec=spec):
            named |= {by.removeprefix("trigger "), spec.model}
        case _:
            pass
    return frozenset(name for name in named if isinstance(name, str) and name)


def _is_about(event: Event, name: str, number: int | None) -> bool:
    if name not in names_of(event):
        return False
    if number is None:
        return True
    data = event.data
    return data.key.startswith(f"{number}.") if isinstance(data, AlarmRang) else getattr(data, "round", None) == number


def sentence(event: Event) -> str:
    """What happened, in a few words."""
    return _sentence(event) or _of_tenants(event) or _fields(event)


def _fields(event: Event) -> str:
    """The text for an event that has no sentence of its own: its kind, and its plain fields."""
    data = event.data.model_dump(mode="json", exclude_defaults=True)
    shown = {k: v for k, v in data.items() if k != "kind" and isinstance(v, str | int | float)}
    plain = ", ".join(f"{k} {v}" for k, v in shown.items())
    words = event.data.kind.partition(".")[2].replace("_", " ") or event.data.kind
    return f"{words}: {plain}" if plain else words


def _of_tenants(event: Event) -> str | None:
    match event.data:
        case TenantAdded(tenant=tenant, by=by, regions=regions):
            return f"tenant {tenant} was added by {by}, with {', '.join(regions)}"
        case TenantChanged(tenant=tenant, by=by):
            return f"tenant {tenant} was changed by {by}"
        case TenantRemoved(tenant=tenant, by=by):
            return f"tenant {tenant} was removed by {by}"
        case TenantForgotten(tenant=tenant):
            return f"nothing of tenant {tenant} is stored any more"
        case QuotaSet(quota=quota):
            return f"quota: {quota.nodes} nodes, {quota.runs} runs, {quota.bytes} bytes, {quota.money} a month"
        case _:
            return None


def _sentence(event: Event) -> str | None:
    match event.data:
        case RunRequested(by=by, cause=cause):
            return f"requested by {by}" + (f", because of {cause}" if cause else "")
        case RunPauseRequested(reason=reason) | RunCancelRequested(reason=reason):
            return f"{event.data.kind.removeprefix('run.').removesuffix('_requested')} {reason}"
        case RunResumeRequested():
            return "resumed"
        case AggregatorStarted(attempt=attempt):
            return f"an aggregator started, attempt {attempt}"
        case AggregatorWaits(attempt=attempt, reason=reason):
            return f"the aggregator of attempt {attempt} waits: {reason}"
        case AggregatorExited(attempt=attempt, code=code, reason=reason):
            return f"the aggregator of attempt {attempt} ended with code {code}" + (f": {reason}" if reason else "")
        case RoundsRestarted():
            return "its app began again from the first round"
        case AlarmRang(key=key):
            return f"alarm {key} rang"
        case _:
            others = (_end_sentence, _round_sentence, _node_sentence, _release_sentence, _trust_sentence)
            return next((text for each in others if (text := each(event)) is not None), None)


def _end_sentence(event: Event) -> str | None:
    match event.data:
        case RunStopRequested(reason=reason):
            return f"to be completed now: {reason}"
        case RunCompleted(note=note):
            return "completed" + (f": {note}" if note else "")
        case RunFailed(reason=reason):
            return f"failed: {reason}"
        case _:
            return None


def _round_sentence(event: Event) -> str | None:
    match event.data:
        case RoundOpened(round=number, trial=trial, phase=phase, nodes=nodes):
            return f"round {number}, trial {trial}: {phase} asked of {', '.join(nodes)}"
        case UpdateReceived(round=number, phase=phase, node=node):
            return f"round {number}: {phase} of {node} counts"
        case UpdateRefused(round=number, phase=phase, node=node, category=category, reason=reason):
            return f"round {number}: {phase} of {node} does not count, {category}: {reason}"
        case RoundCollected(round=number, phase=phase, received=received, cause=cause):
            return f"round {number}: {phase} ended with {received} answers, {cause}"
        case RoundWaits(held=held) if held:
            return f"held: {held}"
        case RoundWaits(needed=needed, there=there):
            return f"waits for {needed} nodes, {there} are there"
        case RoundAbandoned(round=number, trial=trial, reason=reason):
            return f"round {number}, trial {trial} abandoned: {reason}"
        case RoundClosed(round=number):
            return f"round {number} closed"
        case _:
            return None


def _node_sentence(event: Event) -> str | None:
    match event.data:
        case NodeJoined():
            return "its agent started"
        case NodeOnline():
            return "came online again"
        case NodeOffline(reason=reason):
            return f"went offline: {reason}"
        case NodeMeasured(rollout=rollout, measured=measured):
            numbers = ", ".join(f"{k} {v:g}" for k, v in measured.model_dump().items() if v)
            return f"{rollout}: measured {numbers or 'nothing yet'}"
        case NodePhaseReported(rollout=rollout, node=node, phase=phase, reason=reason):
            return f"{rollout}: {node} {phase}" + (f", {reason}" if reason else "")
        case _:
            return None


def _trust_sentence(event: Event) -> str | None:
    match event.data:
        case TrustPublished(after=after, roots=roots, targets=targets, by=by):
            news = [f"root {after + len(roots)}"] if roots else []
            news += ["delegations"] if targets else []
            return f"new {' and '.join(news) or 'metadata'}, signed offline" + (f", published by {by}" if by else "")
        case TrustVouched(version=version):
            return f"the metadata were vouched for again (timestamp {version})"
        case OrderRefused(node=node, what=what, refusal=refusal, about=about, reason=reason):
            return f"{node} refused {what} {about} ({refusal}): {reason}"
        case NodeQuarantined(reason=reason, by=by, lifted=lifted):
            words = "may train again" if lifted else "is asked to train no more"
            return " ".join([words, *([f"by {by}"] if by else [])]) + (f": {reason}" if reason else "")
        case ReleaseAttested(model=model, release=release):
            return f"a release of {model} is vouched for ({release.digest[:12]})"
        case _:
            return None


def _release_sentence(event: Event) -> str | None:
    match event.data:
        case ModelProduced(run=run, model=model):
            return f"{run} produced a model for {model}"
        case ReleasePublished(manifest=manifest):
            return f"release {manifest.model} v{manifest.version} is published"
        case RolloutStarted(plan=plan, by=by):
            regions = ", ".join(wave.region for wave in plan.waves)
            return f"roll-out of {plan.model} v{plan.version} to {regions}, started by {by}"
        case QueryAnswered(region=region, gate=number, value=value, reason=reason):
            return f"{region}: gate {number + 1} was answered {f'{value:g}' if value is not None else reason}"
        case RegionCached(region=region, wan_bytes=size):
            return f"{region} has the release, {size} bytes over the link"
        case TriggerApplied(rule=rule):
            return f"rule {rule.name} applied: on {rule.type} {rule.do.kind}"
        case SignalReceived(signal=signal):
            fields = ", ".join(f"{k} {v}" for k, v in signal.fields.items())
            return f"{signal.type} arrived" + (f": {fields}" if fields else "")
        case _:
            return None
