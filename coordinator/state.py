"""The coordinator's whole state: a fold of the event log, routed to the reducers.

Only the tables (which aggregate has which id) are mutable; the aggregates themselves are immutable and
change only through their reducers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from datetime import datetime
from typing import TypeVar

from fedtide.coordinator import signals
from fedtide.coordinator.commands import CancelRun, Commands, SetAlarm
from fedtide.coordinator.decisions import Decisions
from fedtide.coordinator.fleet import fleet
from fedtide.coordinator.identity import identities
from fedtide.coordinator.models import registry
from fedtide.coordinator.rollouts import rollouts
from fedtide.coordinator.runs import runs
from fedtide.coordinator.triggers import triggers
from fedtide.fabric.errors import InvalidTransition, NotFound
from fedtide.fabric.events.envelope import (
    AlarmRang,
    CoordinatorElected,
    DriftReported,
    Event,
    FiringFailed,
    ModelProduced,
    NodeJoined,
    NodeOffline,
    NodeOnline,
    ReleasePublished,
    SignalReceived,
    TriggerApplied,
    TriggerRemoved,
    UnknownEvent,
)
from fedtide.fabric.events.identity import (
    IdentityEvent,
    JoinTokenCreated,
    JoinTokenRevoked,
    NodeEnrolled,
    NodeRevoked,
    RegionIssued,
)
from fedtide.fabric.events.rollouts import (
    NodeMeasured,
    NodePhaseReported,
    RegionCached,
    RegionCacheFailed,
    RolloutRetryRequested,
    RolloutStarted,
)
from fedtide.fabric.events.runs import RoundOpened, RunRequested
from fedtide.fabric.plans.trigger_rule import Signal
from fedtide.fabric.tensors.blobs import BlobRef

T = TypeVar("T")


class World:
    """Everything the log says. `apply` is deterministic: the same events give the same world."""

    def __init__(self) -> None:
        self.nodes: dict[str, fleet.Node] = {}
        self.runs: dict[str, runs.Run] = {}
        self.models: dict[str, registry.Model] = {}
        self.rollouts: dict[str, rollouts.Rollout] = {}
        self.triggers: dict[str, triggers.Trigger] = {}
        self.last_asked: dict[str, datetime] = {}
        """When each node was asked to train last, by whatever run."""
        self._just_ended: list[runs.Run | rollouts.Rollout] = []
        self._decisions = Decisions()
        self.identities = identities.Identities()
        self.serving: dict[str, dict[str, BlobRef]] = {}
        """By model and node: the release that the node confirmed last."""

    def copy(self) -> World:
        """The same state, apart from this one: aggregates are immutable, so only the tables are copied."""
        twin = World()
        for name, table in vars(self).items():
            kept = isinstance(table, identities.Identities | Decisions)
            setattr(twin, name, table if kept else table.copy())
        twin.serving = {model: dict(nodes) for model, nodes in self.serving.items()}
        return twin

    def apply(self, event: Event) -> Commands:
        """Fold one event in, and let the trigger rules see what it means.

        Raises:
            InvalidTransition: an event that the state does not allow; nothing has changed.
        """
        return self.decide(event)[1]

    def decide(self, event: Event) -> tuple[Event, Commands]:
        """As `apply`; also returns the event with the decisions that were made, to be logged with it."""
        self._decisions = Decisions(event.decided)
        commands = self._fold(event)
        return event.model_copy(update={"decided": self._decisions.text}), commands

    def _fold(self, event: Event) -> Commands:
        self._just_ended.clear()
        commands = self._apply(event)
        ends = [signal for state in self._just_ended for signal in signals.of_end(event, state)]
        for signal in [*signals.of(event, self.nodes), *ends]:
            commands += self._signal(signal, event.time)
        return commands

    def _apply(self, event: Event) -> Commands:
        data, at = event.data, event.time
        if isinstance(data, NodeMeasured | RegionCached | RegionCacheFailed | rollouts.RolloutAction):
            return self._change_rollout(data, event)
        match data:
            case FiringFailed() | TriggerApplied() | TriggerRemoved():
                return self._change_rule(data, at)
            case SignalReceived() | DriftReported() | CoordinatorElected() | UnknownEvent():
                return ()
            case NodeJoined() | NodeOnline() | NodeOffline():
                node, commands = fleet.step(self.nodes.get(data.node), data, at)
                self.nodes[data.node] = node
                return commands + self._node_changed(node, at)
            case ModelProduced() | ReleasePublished():
                return self._release(data)
            case JoinTokenCreated() | JoinTokenRevoked() | NodeEnrolled() | NodeRevoked() | RegionIssued():
                return self._identity(data, at)
            case RolloutStarted():
                return self._start_rollout(data, event)
            case NodePhaseReported():
                return self._node_phase(data, event)
            case AlarmRang(owner=owner, id=key):
                return self._rollout(key, data, event) if owner == "rollout" else self._run(key, data, at)
            case _:
                return self._run(data.run, data, at)

    def _identity(self, data: IdentityEvent, at: datetime) -> Commands:
        self.identities, commands = identities.step(self.identities, data, at)
        node = self.nodes.get(data.node) if isinstance(data, NodeRevoked) else None
        if node is None or not node.online:
            return commands
        gone, more = fleet.step(node, NodeOffline(node=node.name, reason="revoked"), at)
        self.nodes[node.name] = gone
        return commands + more + self._node_changed(gone, at)

    def _run(self, key: str, data: runs.RunEvent, at: datetime) -> Commands:
        before = self.runs.get(key)
        run, commands = runs.step(before, data, at)
        self.runs[key] = run
        if isinstance(data, RunRequested):
            self._started(key)
        if isinstance(data, RoundOpened) and data.phase == "train":
            self.last_asked |= dict.fromkeys(data.nodes, at)
        if isinstance(run, runs.Ended) and not isinstance(before, runs.Ended):
            self._just_ended.append(run)
            commands += self._ended(key, at)
        return commands

    def _release(self, data: ModelProduced | ReleasePublished) -> Commands:
        if isinstance(data, ReleasePublished):
            return self._model(data.manifest.model, data)
        producer = self.runs.get(data.run)
        if producer is None:
            raise InvalidTransition(f"{data.kind} of a run {data.run} that was never requested")
        given_up = isinstance(producer, runs.Ended) and producer.outcome != "completed"
        return () if given_up else self._model(data.model, data)

    def _start_rollout(self, data: RolloutStarted, event: Event) -> Commands:
        commands = self._rollout(data.rollout, data, event)
        commands += self._supersede(data.plan.model, data.rollout, event.time)
        return self._model(data.plan.model, data) + commands

    def _change_rollout(
        self, data: NodeMeasured | RegionCached | RegionCacheFailed | rollouts.RolloutAction, event: Event
    ) -> Commands:
        commands = self._rollout(data.rollout, data, event)
        if isinstance(data, RolloutRetryRequested):
            commands += self._model(self.rollouts[data.rollout].facts.plan.model, data)
        return commands

    def _node_changed(self, node: fleet.Node, at: datetime) -> Commands:
        commands: Commands = ()
        for key, rollout in self.rollouts.items():
            if node.online:
                state, more = rollouts.returned(rollout, node, at, self._decisions)
            else:
                state, more = rollouts.lost(rollout, node.name, at, self._decisions)
            commands += self._replace_rollout(key, rollout, state, at) + more
        return commands

    def _node_phase(self, data: NodePhaseReported, event: Event) -> Commands:
        commands = self._rollout(data.rollout, data, event)
        if data.phase == "confirmed":
            self._note_served(data)
        return commands

    def _change_rule(self, data: FiringFailed | TriggerApplied | TriggerRemoved, at: datetime) -> Commands:
        if isinstance(data, FiringFailed):
            return self._firing_failed(data.rule, data.id, data.reason, at)
        if isinstance(data, TriggerRemoved):
            self.triggers.pop(data.name, None)
        else:
            old = self.triggers.get(data.rule.name, triggers.Trigger(data.rule))
            self.triggers[data.rule.name] = replace(old, rule=data.rule)
        return ()

    def _firing_failed(self, name: str, key: str, reason: str, at: datetime) -> Commands:
        if name not in self.triggers:
            return ()
        self.triggers[name], commands = triggers.failed(self.triggers[name], key, reason, at)
        return commands

    def _signal(self, signal: Signal, at: datetime) -> Commands:
        commands: Commands = ()
        for name, trigger in self.triggers.items():
            self.triggers[name], more = triggers.step(trigger, signal, at, self._decisions)
            commands += more
        return commands

    def is_asked_for(self, rule: str, key: str) -> bool:
        """Whether a rule still wants to start `key` (and was not replaced, removed or answered meanwhile)."""
        trigger = self.triggers.get(rule)
        return trigger is not None and any(f.started == key for f in trigger.asked)

    def _started(self, key: str) -> None:
        for name, trigger in self.triggers.items():
            self.triggers[name] = triggers.started(trigger, key)

    def _ended(self, key: str, at: datetime) -> Commands:
        commands: Commands = ()
        for name, trigger in self.triggers.items():
            self.triggers[name], more = triggers.ended(trigger, key, at)
            commands += more
        return commands

    def _model(self, name: str, data: registry.ModelEvent) -> Commands:
        model, commands = registry.step(self.models.get(name, registry.Model(name)), data)
        self.models[name] = model
        return commands

    def _rollout(self, key: str, data: rollouts.RolloutEvent, event: Event) -> Commands:
        before = self.rollouts.get(key)
        rollout, commands = rollouts.step(before, data, event.time, self._decisions)
        self._started(key)
        return commands + self._replace_rollout(key, before, rollout, event.time)

    def _replace_rollout(
        self, key: str, before: rollouts.Rollout | None, after: rollouts.Rollout, at: datetime
    ) -> Commands:
        """Store the new state of a roll-out; returns what its end means for runs and trigger rules."""
        self.rollouts[key] = after
        if type(before) is type(after) or rollouts.is_open(after):
            return ()
        self._just_ended.append(after)
        return (*self._ended(key, at), *self._withdrawn(after))

    def _withdrawn(self, rollout: rollouts.Rollout) -> Commands:
        """Cancel the runs that train from a release that was rolled back."""
        if not isinstance(rollout, rollouts.RolledBack):
            return ()
        release, name = rollout.facts.plan.release, rollout.facts.rollout
        reason = f"its base was withdrawn: {name} was rolled back"
        return tuple(
            CancelRun(key, reason)
            for key, run in self.active_runs()
            if run.facts.spec.base == release
            and run.facts.spec.purpose == "train"
            and run.facts.requested_at <= rollout.at
        )

    def _note_served(self, data: NodePhaseReported) -> None:
        state = self.rollouts[data.rollout]
        nodes = self.serving.setdefault(state.facts.plan.model, {})
        release = rollouts.served_after(state, data)
        if release is None:
            nodes.pop(data.node, None)
        else:
            nodes[data.node] = release

    def _supersede(self, model: str, by: str, at: datetime) -> Commands:
        commands: Commands = ()
        for key, rollout in self.rollouts.items():
            if key != by and rollout.facts.plan.model == model:
                state = self.rollouts[key] = rollouts.supersede(rollout, by)
                if state is not rollout:
                    commands += self._ended(key, at)
                    commands += rollouts.pending_commands(state) if isinstance(state, rollouts.Superseded) else ()
        return commands

    def pending_commands(self) -> Iterator[Commands]:
        """What the state as a whole still wants done, after a restart."""
        for run in self.runs.values():
            yield runs.pending_commands(run)
        for model in self.models.values():
            yield registry.pending_commands(model)
        for rollout in self.rollouts.values():
            yield rollouts.pending_commands(rollout)
            yield self._withdrawn(rollout)
        for trigger in self.triggers.values():
            yield triggers.pending_commands(trigger)

    def wants_alarm(self, owner: str, id: str, key: str) -> bool:
        """Whether the state still waits for this alarm."""
        if owner == "rollout":
            return id in self.rollouts and rollouts.wants_alarm(self.rollouts[id], key)
        commands = runs.pending_commands(self.runs[id]) if id in self.runs else ()
        return any(isinstance(c, SetAlarm) and c.key == key for c in commands)

    def tasks_of_others(self, run: str) -> Counter[str]:
        """How many tasks each node has of runs other than `run`."""
        return Counter(n for key, other in self.active_runs() if key != run for n in runs.awaited(other))

    def active_runs(self) -> Iterator[tuple[str, runs.Run]]:
        return ((key, run) for key, run in self.runs.items() if not isinstance(run, runs.Ended))

    def run(self, key: str) -> runs.Run:
        return _find(self.runs, key, "run")

    def node(self, key: str) -> fleet.Node:
        return _find(self.nodes, key, "node")

    def model(self, key: str) -> registry.Model:
        return _find(self.models, key, "model")

    def rollout(self, key: str) -> rollouts.Rollout:
        return _find(self.rollouts, key, "roll-out")

    def trigger(self, key: str) -> triggers.Trigger:
        return _find(self.triggers, key, "trigger")

    def release_of(self, run: str) -> registry.Release | None:
        """The release that a run produced, once it is published."""
        releases = (r for m in self.models.values() for r in m.releases)
        return next((r for r in releases if r.manifest.lineage.run == run), None)

    def is_publishing(self, run: str) -> bool:
        """Whether the model that a run produced is not published as a release yet."""
        return any(produced.run == run for m in self.models.values() for produced, _ in m.producing)


def _find(table: Mapping[str, T], key: str, what: str) -> T:
    found = table.get(key)
    if found is None:
        near = ", ".join(sorted(table)[:8]) or "none yet"
        raise NotFound(f"there is no {what} {key!r}", f"Known: {near}")
    return found
