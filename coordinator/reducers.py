"""What every event does to the world. Pure: the same events give the same world, and the same commands.

`REDUCERS` has a line for each type of event; `EFFECTS` one for what a change of one aggregate means to the others.
A reducer changes a draft, asks for commands, and declares effects; effects are taken in the order in which they were
declared, until none is left. Only then do trigger rules see what the event meant.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any

from immutables import Map

from fedtide.coordinator import bookkeeping, signals
from fedtide.coordinator.commands import Commands
from fedtide.coordinator.decisions import Decisions
from fedtide.coordinator.fleet import fleet, forecast
from fedtide.coordinator.identity import epochs, identities, people, tenants, trust
from fedtide.coordinator.models import registry
from fedtide.coordinator.rollouts import rollouts
from fedtide.coordinator.runs import runs
from fedtide.coordinator.state import World
from fedtide.coordinator.triggers import triggers
from fedtide.fabric.errors import InvalidTransition
from fedtide.fabric.events import costs as cost_events
from fedtide.fabric.events import envelope as event_types
from fedtide.fabric.events import identity as identity_events
from fedtide.fabric.events import people as people_events
from fedtide.fabric.events import rollouts as rollout_events
from fedtide.fabric.events import runs as run_events
from fedtide.fabric.events import tenants as tenant_events
from fedtide.fabric.events.envelope import Event
from fedtide.fabric.ids import NAME
from fedtide.fabric.plans.prices import Budget
from fedtide.fabric.plans.trigger_rule import Signal


@dataclass(frozen=True, slots=True)
class Started:
    """A run or roll-out came into being."""

    key: str


@dataclass(frozen=True, slots=True)
class Ended:
    """A run or roll-out is over."""

    key: str
    state: runs.Run | rollouts.Rollout


@dataclass(frozen=True, slots=True)
class PresenceChanged:
    """A node joined, came back or went away."""

    node: fleet.Node


@dataclass(frozen=True, slots=True)
class Superseding:
    """A newer roll-out of a model has started."""

    model: str
    by: str


@dataclass(frozen=True, slots=True)
class ModelTouched:
    """Something that the registry counts: a release, or an offer under a new counter."""

    name: str
    data: registry.ModelEvent


Effect = Started | Ended | PresenceChanged | Superseding | ModelTouched


@dataclass(slots=True)
class Change:
    """One event on its way through: the draft it changes, and what follows from it."""

    world: World
    event: Event
    decisions: Decisions
    commands: list[Any] = field(default_factory=list)
    effects: deque[Effect] = field(default_factory=deque)
    ended: list[runs.Run | rollouts.Rollout] = field(default_factory=list)
    paused: list[rollouts.Paused] = field(default_factory=list)
    signals: list[Signal] = field(default_factory=list)
    """Of the ledger and of budgets."""
    is_news: bool = True
    """Whether the event has changed what it is about."""

    @property
    def at(self) -> datetime:
        return self.event.time


def step(draft: World, event: Event) -> tuple[Event, Commands]:
    """Fold one event into a draft, which is of no use any more if this raises.

    Returns:
        The event with the decisions that were made, to be logged with it, and the commands that follow.

    Raises:
        InvalidTransition: an event that the state does not allow.
    """
    change = Change(draft, event, Decisions(event.decided))
    REDUCERS[type(event.data)](change, event.data)
    while change.effects:
        effect = change.effects.popleft()
        EFFECTS[type(effect)](change, effect)
    booked = bookkeeping.book(change.world, event, is_news=change.is_news)
    change.signals += booked.signals
    _hold_rollouts(change, booked.used_up)
    _signal(change)
    return event.model_copy(update={"decided": change.decisions.text}), tuple(change.commands)


def _hold_rollouts(change: Change, used_up: list[Budget]) -> None:
    """Begin no more waves of what has no budget left; a person may let them go on. Going back is never held."""
    data, world = change.event.data, change.world
    if isinstance(data, rollout_events.RolloutStarted):
        keys, spent = [data.rollout], bookkeeping.used_up(world)
    else:
        keys, spent = list(world.rollouts) if used_up else [], used_up
    for key in keys:
        why = bookkeeping.why_no_waves(world, key, spent)
        if why is not None and isinstance(world.rollouts[key], rollouts.Rolling):
            _step_rollout(change, key, rollout_events.RolloutPauseRequested(rollout=key, reason=why))


def _prices(change: Change, data: cost_events.PricesApplied) -> None:
    bookkeeping.prices_applied(change.world, data, change.at)


def _budget(change: Change, data: cost_events.BudgetApplied) -> None:
    bookkeeping.budget_applied(change.world, data, change.at)


def _no_budget(change: Change, data: cost_events.BudgetRemoved) -> None:
    bookkeeping.budget_removed(change.world, data)


def _usage(change: Change, data: cost_events.UsageReported) -> None:
    free = change.world.free
    for region, there in data.available.items():
        if there.nodes:
            share = min(1.0, there.free / there.nodes)
            free[region] = forecast.after_sample(free.get(region, Map()), change.at, share)


def _nothing(change: Change, data: Any) -> None:
    """It means something to trigger rules only, or to nobody."""


def _unreadable(change: Change, data: event_types.UnreadableEvent) -> None:
    raise InvalidTransition(f"event {data.sequence} of the log cannot be read: {data.reason}")


def _node(change: Change, data: fleet.NodeEvent) -> None:
    node, commands = fleet.step(change.world.nodes.get(data.node), data, change.at)
    change.world.nodes[data.node] = node
    change.commands += commands
    change.effects.append(PresenceChanged(node))


def _node_told(change: Change, data: fleet.NodeEvent) -> None:
    """What a node says, or what is said of it, that leaves it as present as it was."""
    change.world.nodes[data.node], commands = fleet.step(change.world.nodes.get(data.node), data, change.at)
    change.commands += commands


def _trust(change: Change, data: identity_events.TrustEvent) -> None:
    change.world.trust = trust.step(change.world.trust, data)


def _people(change: Change, data: people_events.PeopleEvent) -> None:
    change.world.people = people.step(change.world.people, data, change.at)


def _tenant(change: Change, data: tenant_events.TenantEvent) -> None:
    change.world.tenants = tenants.step(change.world.tenants, data, change.at)


def _quota(change: Change, data: tenant_events.QuotaSet) -> None:
    """What is there already stays, also if it is more than that."""
    change.world.quota = data.quota
    bookkeeping.quota_set(change.world, data.quota.money, change.at)


def _attested(change: Change, data: event_types.ReleaseAttested) -> None:
    if data.model not in change.world.models:
        raise InvalidTransition(f"{data.kind} of a model {data.model} that is not there")
    change.effects.append(ModelTouched(data.model, data))


def _presence_changed(change: Change, effect: PresenceChanged) -> None:
    node = effect.node
    for key, rollout in change.world.rollouts.items():
        if node.online:
            state, commands = rollouts.returned(rollout, node, change.at, change.decisions)
        else:
            state, commands = rollouts.lost(rollout, node.name, change.at, change.decisions)
        if state is not rollout:
            _replace_rollout(change, key, rollout, state)
        change.commands += commands


def _identity(change: Change, data: identity_events.IdentityEvent) -> None:
    if isinstance(data, identity_events.NodeEnrolled) and not data.renews:
        known = change.world.identities.nodes.values()
        others = sum(not each.revoked and each.node != data.node for each in known)
        if (reason := tenants.why_no_node(change.world.quota, others)) is not None:
            raise InvalidTransition(*reason)
    change.world.identities, commands = identities.step(change.world.identities, data, change.at)
    change.commands += commands
    node = change.world.nodes.get(data.node) if isinstance(data, identity_events.NodeRevoked) else None
    if node is not None and node.online:
        _node(change, event_types.NodeOffline(node=node.name, reason="revoked"))


def _log_begun(change: Change, data: identity_events.LogBegun) -> None:
    change.world.epoch = epochs.step(change.world.epoch, data, change.at)


def _log_restored(change: Change, data: identity_events.LogRestored) -> None:
    """Nodes may have seen more than this log knows of: they are told again what they should serve."""
    change.world.epoch = epochs.step(change.world.epoch, data, change.at)
    for rollout in change.world.rollouts.values():
        change.commands += [*rollouts.pending_commands(rollout), *rollouts.kept_states(rollout)]


def _removed(change: Change, data: identity_events.NodeRemoved) -> None:
    node = change.world.nodes.get(data.node)
    if node is not None and node.online:
        raise InvalidTransition(f"node {data.node} is online", "Stop its agent, or revoke it first")
    change.world.identities, commands = identities.step(change.world.identities, data, change.at)
    change.commands += commands
    _forget_node(change.world, data.node)


def _region_removed(change: Change, data: identity_events.RegionRemoved) -> None:
    there = [node for node in change.world.nodes.values() if node.region == data.region]
    if online := sorted(node.name for node in there if node.online):
        raise InvalidTransition(
            f"nodes of region {data.region} are online: {', '.join(online[:8])}", "Stop their agents, or revoke them"
        )
    change.world.identities, commands = identities.step(change.world.identities, data, change.at)
    change.commands += commands
    for node in there:
        _forget_node(change.world, node.name)


def _forget_node(world: World, name: str) -> None:
    world.nodes.pop(name, None)
    world.last_asked.pop(name, None)
    for model, nodes in world.serving.items():
        if name in nodes:
            world.serving[model] = nodes.delete(name)


def _run_alarm_or_rollout_alarm(change: Change, data: event_types.AlarmRang) -> None:
    if data.owner == "rollout":
        _step_rollout(change, data.id, data)
    else:
        _step_run(change, data.id, data)


def _run(change: Change, data: Any) -> None:
    _step_run(change, data.run, data)


def _cleaned_up(change: Change, data: run_events.RunCleanedUp) -> None:
    _step_run(change, data.run, data)
    if data.key:
        change.world.identities, commands = identities.run_ended(change.world.identities, data.key, change.at)
        change.commands += commands


def _run_removed(change: Change, data: run_events.RunRemoved) -> None:
    """Raises InvalidTransition if it has not ended."""
    if not isinstance(change.world.run(data.run), runs.Ended):
        raise InvalidTransition(f"run {data.run} has not ended")
    del change.world.runs[data.run]


def _run_requested(change: Change, data: run_events.RunRequested) -> None:
    active = sum(1 for _ in change.world.active_runs())
    if (why := tenants.why_no_run(change.world.quota, active)) is not None:
        raise InvalidTransition(*why)
    _step_run(change, data.run, data)
    change.effects.append(Started(data.run))


def _round_opened(change: Change, data: run_events.RoundOpened) -> None:
    before = change.world.runs.get(data.run)
    _step_run(change, data.run, data)
    change.is_news = change.world.runs[data.run] != before
    if data.phase == "train":
        change.world.last_asked.update(dict.fromkeys(data.nodes, change.at))


def _step_run(change: Change, key: str, data: runs.RunEvent) -> None:
    before = change.world.runs.get(key)
    run, commands = runs.step(before, data, change.at)
    change.world.runs[key] = run
    change.commands += commands
    if isinstance(run, runs.Ended) and not isinstance(before, runs.Ended):
        change.effects.append(Ended(key, run))


def _produced(change: Change, data: event_types.ModelProduced) -> None:
    producer = change.world.runs.get(data.run)
    if producer is None:
        raise InvalidTransition(f"{data.kind} of a run {data.run} that was never requested")
    wanted = producer.facts.spec.model
    if wanted not in (None, data.model) or not re.fullmatch(NAME, data.model):
        raise InvalidTransition(f"{data.kind} of run {data.run} names the model {data.model[:100]!r}, not {wanted!r}")
    if not isinstance(producer, runs.Ended) or producer.outcome == "completed":
        change.effects.append(ModelTouched(data.model, data))


def _published(change: Change, data: event_types.ReleasePublished) -> None:
    change.effects.append(ModelTouched(data.manifest.model, data))


def _model_touched(change: Change, effect: ModelTouched) -> None:
    model = change.world.models.get(effect.name, registry.Model(effect.name))
    change.world.models[effect.name], commands = registry.step(model, effect.data)
    change.commands += commands


def _rollout(change: Change, data: Any) -> None:
    _step_rollout(change, data.rollout, data)


def _rollout_started(change: Change, data: rollout_events.RolloutStarted) -> None:
    _step_rollout(change, data.rollout, data)
    change.effects += [
        Started(data.rollout),
        Superseding(data.plan.model, data.rollout),
        ModelTouched(data.plan.model, data),
    ]


def _retried(change: Change, data: rollout_events.RolloutRetryRequested) -> None:
    _step_rollout(change, data.rollout, data)
    change.effects.append(ModelTouched(change.world.rollouts[data.rollout].facts.plan.model, data))


def _phase(change: Change, data: rollout_events.NodePhaseReported) -> None:
    before = change.world.rollouts.get(data.rollout)
    _step_rollout(change, data.rollout, data)
    change.is_news = change.world.rollouts[data.rollout] != before
    if data.phase != "confirmed":
        return
    state = change.world.rollouts[data.rollout]
    nodes = change.world.serving.get(state.facts.plan.model, Map())
    release = rollouts.served_after(state, data)
    if release is not None:
        nodes = nodes.set(data.node, release)
    elif data.node in nodes:
        nodes = nodes.delete(data.node)
    change.world.serving[state.facts.plan.model] = nodes


def _step_rollout(change: Change, key: str, data: rollouts.RolloutEvent) -> None:
    before = change.world.rollouts.get(key)
    rollout, commands = rollouts.step(before, data, change.at, change.decisions)
    change.commands += commands
    _replace_rollout(change, key, before, rollout)


def _replace_rollout(change: Change, key: str, before: rollouts.Rollout | None, after: rollouts.Rollout) -> None:
    change.world.rollouts[key] = after
    if type(before) is type(after):
        return
    if not rollouts.is_open(after):
        change.effects.append(Ended(key, after))
    elif isinstance(after, rollouts.Paused):
        change.paused.append(after)


def _superseding(change: Change, effect: Superseding) -> None:
    for key, rollout in change.world.rollouts.items():
        if key == effect.by or rollout.facts.plan.model != effect.model:
            continue
        state = rollouts.supersede(rollout, effect.by)
        if state is not rollout:
            _replace_rollout(change, key, rollout, state)
            if isinstance(state, rollouts.Superseded):
                change.commands += rollouts.pending_commands(state)


def _firing_failed(change: Change, data: event_types.FiringFailed) -> None:
    trigger = change.world.triggers.get(data.rule)
    if trigger is not None:
        change.world.triggers[data.rule], commands = triggers.failed(trigger, data.id, data.reason, change.at)
        change.commands += commands


def _notified(change: Change, data: event_types.NotificationSent) -> None:
    trigger = change.world.triggers.get(data.rule)
    if trigger is not None:
        change.world.triggers[data.rule], commands = triggers.ended(trigger, data.id, change.at)
        change.commands += commands


def _rule_applied(change: Change, data: event_types.TriggerApplied) -> None:
    old = change.world.triggers.get(data.rule.name, triggers.Trigger(data.rule))
    change.world.triggers[data.rule.name] = replace(old, rule=data.rule)


def _rule_removed(change: Change, data: event_types.TriggerRemoved) -> None:
    change.world.triggers.pop(data.name, None)


def _started(change: Change, effect: Started) -> None:
    for name, trigger in change.world.triggers.items():
        state = triggers.started(trigger, effect.key)
        if state is not trigger:
            change.world.triggers[name] = state


def _ended(change: Change, effect: Ended) -> None:
    change.ended.append(effect.state)
    bookkeeping.ended(change.world, effect.key, _outcome(effect.state))
    for name, trigger in change.world.triggers.items():
        state, commands = triggers.ended(trigger, effect.key, change.at)
        if state is not trigger:
            change.world.triggers[name] = state
        change.commands += commands
    if isinstance(effect.state, rollouts.RolledBack):
        change.commands += change.world.withdrawn(effect.state)


def _outcome(state: runs.Run | rollouts.Rollout) -> str:
    """Why what was used for it was of no use; empty: it was."""
    match state:
        case runs.Ended(outcome=outcome) if outcome != "completed":
            return str(outcome)
        case rollouts.RolledBack():
            return "rolled_back"
        case _:
            return ""


def _signal(change: Change) -> None:
    """Let every rule see what the event meant, and what it has ended."""
    ends = [signal for state in (*change.ended, *change.paused) for signal in signals.of_end(change.event, state)]
    for signal in [
        *signals.of(change.event, change.world.nodes, change.world.current, change.world.runs.get),
        *ends,
        *change.signals,
    ]:
        for name, trigger in change.world.triggers.items():
            state, commands = triggers.step(trigger, signal, change.at, change.decisions)
            if state is not trigger:
                change.world.triggers[name] = state
            change.commands += commands


REDUCERS: Mapping[type, Callable[[Change, Any], None]] = {
    cost_events.BudgetApplied: _budget,
    cost_events.BudgetRemoved: _no_budget,
    cost_events.PricesApplied: _prices,
    cost_events.UsageReported: _usage,
    event_types.AlarmRang: _run_alarm_or_rollout_alarm,
    event_types.CoordinatorElected: _nothing,
    event_types.DriftReported: _nothing,
    event_types.FiringFailed: _firing_failed,
    event_types.ModelProduced: _produced,
    event_types.NodeJoined: _node,
    event_types.NodeOffline: _node,
    event_types.NodeOnline: _node,
    event_types.NotificationSent: _notified,
    event_types.ReleaseAttested: _attested,
    event_types.ReleasePublished: _published,
    event_types.SignalReceived: _nothing,
    event_types.TriggerApplied: _rule_applied,
    event_types.TriggerRemoved: _rule_removed,
    event_types.UnknownEvent: _nothing,
    event_types.UnreadableEvent: _unreadable,
    identity_events.JoinTokenCreated: _identity,
    identity_events.JoinTokenRevoked: _identity,
    identity_events.NodeEnrolled: _identity,
    identity_events.LogBegun: _log_begun,
    identity_events.LogRestored: _log_restored,
    identity_events.NodeQuarantined: _node_told,
    identity_events.NodeRemoved: _removed,
    identity_events.NodeRevoked: _identity,
    identity_events.OrderRefused: _node_told,
    identity_events.RegionIssued: _identity,
    identity_events.RegionRemoved: _region_removed,
    identity_events.TrustPublished: _trust,
    identity_events.TrustVouched: _trust,
    people_events.ServiceTokenCreated: _people,
    people_events.ServiceTokenRevoked: _people,
    tenant_events.QuotaSet: _quota,
    tenant_events.TenantAdded: _tenant,
    tenant_events.TenantChanged: _tenant,
    tenant_events.TenantForgotten: _tenant,
    tenant_events.TenantRemoved: _tenant,
    rollout_events.NodeMeasured: _rollout,
    rollout_events.NodePhaseReported: _phase,
    rollout_events.QueryAnswered: _rollout,
    rollout_events.RegionCached: _rollout,
    rollout_events.RegionCacheFailed: _rollout,
    rollout_events.RolloutAbortRequested: _rollout,
    rollout_events.RolloutNextRequested: _rollout,
    rollout_events.RolloutPauseRequested: _rollout,
    rollout_events.RolloutPromoteRequested: _rollout,
    rollout_events.RolloutResumeRequested: _rollout,
    rollout_events.RolloutRetryRequested: _retried,
    rollout_events.RolloutRollbackRequested: _rollout,
    rollout_events.RolloutSettled: _rollout,
    rollout_events.RolloutStarted: _rollout_started,
    run_events.AggregatorExited: _run,
    run_events.AggregatorStarted: _run,
    run_events.AggregatorWaits: _run,
    run_events.RoundAbandoned: _run,
    run_events.RoundClosed: _run,
    run_events.RoundCollected: _run,
    run_events.RoundWaits: _run,
    run_events.RunRemoved: _run_removed,
    run_events.RunStopRequested: _run,
    run_events.RoundOpened: _round_opened,
    run_events.RoundsRestarted: _run,
    run_events.RunCancelRequested: _run,
    run_events.RunCleanedUp: _cleaned_up,
    run_events.RunCompleted: _run,
    run_events.RunFailed: _run,
    run_events.RunPauseRequested: _run,
    run_events.RunRequested: _run_requested,
    run_events.RunResumeRequested: _run,
    run_events.UpdateReceived: _run,
    run_events.UpdateRefused: _run,
}

EFFECTS: Mapping[type, Callable[[Change, Any], None]] = {
    Ended: _ended,
    ModelTouched: _model_touched,
    PresenceChanged: _presence_changed,
    Started: _started,
    Superseding: _superseding,
}
