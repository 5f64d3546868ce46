"""A roll-out: one release to a fleet, wave by wave (`waves`), and its rollback when it is worse. Pure.

`TRANSITIONS` alone defines which state may follow which, and `ACTIONS` alone what a person may do in each state.
Waves of one group run in parallel, groups one after the other. Nodes that were offline get the release in the
catch-up cohort, even after the roll-out is completed. Times come from the events.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime

from fedtide.coordinator.commands import Commands, SetAlarm, SetDesired, SettleNodes
from fedtide.coordinator.decisions import Decisions
from fedtide.coordinator.fleet.fleet import Node
from fedtide.coordinator.rollouts import catch_up, waves
from fedtide.coordinator.rollouts.waves import (
    Baking,
    Caching,
    NodeState,
    Offering,
    Over,
    Report,
    RolloutFacts,
    TakenBack,
    Waiting,
    Wave,
    WaveProblem,
)
from fedtide.coordinator.transitions import Transition, check_transition
from fedtide.fabric.errors import InvalidTransition
from fedtide.fabric.events.envelope import AlarmRang
from fedtide.fabric.events.rollouts import (
    NodeMeasured,
    NodePhaseReported,
    QueryAnswered,
    RegionCached,
    RegionCacheFailed,
    RolloutAbortRequested,
    RolloutNextRequested,
    RolloutPauseRequested,
    RolloutPromoteRequested,
    RolloutResumeRequested,
    RolloutRetryRequested,
    RolloutRollbackRequested,
    RolloutSettled,
    RolloutStarted,
)
from fedtide.fabric.messages.requests import RolloutActionName
from fedtide.fabric.messages.views import RolloutState
from fedtide.fabric.tensors.blobs import BlobRef

RolloutAction = (
    RolloutAbortRequested
    | RolloutRollbackRequested
    | RolloutPauseRequested
    | RolloutResumeRequested
    | RolloutPromoteRequested
    | RolloutNextRequested
    | RolloutRetryRequested
)
RolloutEvent = RolloutStarted | Report | RegionCacheFailed | RolloutSettled | RolloutAction | AlarmRang


@dataclass(frozen=True, slots=True)
class Rolling:
    """`group`: waves up to this one may be under way. `alarms`: how many have rung. `dues`: `due` of each wave."""

    facts: RolloutFacts
    waves: tuple[Wave, ...]
    group: int = 0
    alarms: int = 0
    due: datetime | None = None
    dues: tuple[datetime | None, ...] = ()


@dataclass(frozen=True, slots=True)
class Paused:
    """Nothing is offered or decided; reports are still recorded, and too many errors still cause a rollback."""

    at: Rolling
    reason: str

    @property
    def facts(self) -> RolloutFacts:
        return self.at.facts

    @property
    def waves(self) -> tuple[Wave, ...]:
        return self.at.waves


@dataclass(frozen=True, slots=True)
class Completed:
    """Every wave is over. Nodes that come back are still offered the release, unless `stopped` gives a reason not to.

    `followed`: a newer roll-out of the model has started, and serves these nodes from now on.
    """

    facts: RolloutFacts
    waves: tuple[Wave, ...]
    ended_at: datetime
    stopped: str = ""
    followed: bool = False
    alarms: int = 0
    due: datetime | None = None
    dues: tuple[datetime | None, ...] = ()
    settled: frozenset[str] = frozenset()
    """Nodes that keep the release, and are told so."""


@dataclass(frozen=True, slots=True)
class RolledBack:
    """Every node that was offered the release is told to serve the previous one, under a higher counter."""

    facts: RolloutFacts
    waves: tuple[Wave, ...]
    reason: str
    at: datetime
    restored: frozenset[str] = field(default_factory=frozenset)
    stuck: Mapping[str, str] = field(default_factory=dict)
    """Nodes that could not go back, with the reason."""
    followed: bool = False
    """A newer roll-out of the model has started: it serves the nodes that join from now on."""


@dataclass(frozen=True, slots=True)
class Superseded:
    facts: RolloutFacts
    waves: tuple[Wave, ...]
    by: str
    settled: frozenset[str] = frozenset()


SETTLED_TOGETHER = 1_000
"""At most so many nodes are named in one command, and so in one event."""

Rollout = Rolling | Paused | Completed | RolledBack | Superseded

TRANSITIONS: tuple[Transition, ...] = (
    Transition(None, "started", Rolling),
    Transition(Rolling, "every wave is over", Completed),
    Transition(Rolling, "a person, or a gate that cannot decide", Paused),
    Transition(Rolling, "errors, a failed gate, or a person", RolledBack),
    Transition(Rolling, "a newer roll-out of the model", Superseded),
    Transition(Paused, "resumed or promoted", Rolling),
    Transition(Paused, "resumed, and nothing is left to do", Completed),
    Transition(Paused, "errors, or a person", RolledBack),
    Transition(Paused, "a newer roll-out of the model", Superseded),
    Transition(Completed, "rolled back by a person, or errors of late nodes", RolledBack),
)
"""Every change of state. A state may also follow itself."""

ACTIONS: Mapping[RolloutActionName, frozenset[type[Rollout]]] = {
    "abort": frozenset({Rolling, Paused}),
    "rollback": frozenset({Rolling, Paused, Completed}),
    "pause": frozenset({Rolling, Paused}),
    "resume": frozenset({Paused, Completed}),
    "promote": frozenset({Rolling, Paused}),
    "next": frozenset({Rolling}),
    "retry": frozenset({Rolling, Paused, Completed}),
}
"""The states in which a person may take each action. A completed roll-out must not be followed by a newer one, and
only one whose catch-up was stopped can be resumed."""


def served_after(state: Rollout, event: NodePhaseReported) -> BlobRef | None:
    """What a node serves once it confirmed: the release, or what it went back to under the higher counter."""
    known = nodes_of(state).get(event.node)
    if known is not None and known.counter == event.counter:
        return state.facts.plan.release
    return waves.release_before(state.facts.plan, event.node)


def supersede(state: Rollout, by: str) -> Rollout:
    """What becomes of a roll-out when a newer one of the same model starts."""
    match state:
        case Rolling() | Paused():
            return Superseded(state.facts, state.waves, by)
        case Completed():
            return replace(state, stopped=f"superseded by {by}", followed=True, due=None, dues=())
        case RolledBack():
            # The newer roll-out now decides what the absent nodes get.
            return replace(state, restored=frozenset(nodes_of(state)), followed=True)
        case _:
            return state


def nodes_of(state: Rollout) -> Mapping[str, NodeState]:
    """Every node that was offered the release so far, or waits in the catch-up cohort."""
    return {name: known for wave in state.waves for name, known in waves.nodes_of(wave).items()}


def holders(state: Rollout) -> frozenset[str]:
    """The nodes that were offered the release, and may have it."""
    return frozenset(n for n, s in nodes_of(state).items() if not (s.back and not s.claimed))


def state_name(state: Rollout) -> RolloutState:
    """The state as views name it."""
    match state:
        case Rolling():
            return "rolling"
        case Paused():
            return "paused"
        case Completed():
            return "completed"
        case RolledBack():
            return "rolledback"
        case Superseded():
            return "superseded"


def is_open(state: Rollout) -> bool:
    return isinstance(state, Rolling | Paused)


def wants_cache(state: Rollout, region: str) -> bool:
    """Whether a wave of this region still waits for the release to be there."""
    if not isinstance(state, Rolling | Paused):
        return False
    planned = zip(state.facts.plan.waves, state.waves, strict=True)
    return any(plan.region == region and isinstance(wave, Caching) for plan, wave in planned)


def wants_alarm(state: Rollout, key: str) -> bool:
    return isinstance(state, Rolling | Completed) and state.due is not None and key == alarm_key(state)


def alarm_key(state: Rolling | Completed) -> str:
    return f"{type(state).__name__.lower()}-{state.alarms}"


def pending_commands(state: Rollout) -> Commands:
    """What this state still wants done: issued on entry, and again after a restart."""
    match state:
        case Rolling():
            return (*_of_waves(state), *_alarm(state))
        case Completed(stopped=""):
            return (
                *waves.pending_offers(state.facts, state.waves),
                *_taken_back(state),
                *_alarm(state),
                *_to_settle(state),
            )
        case Completed(followed=False):
            return (*_taken_back(state), *_to_settle(state))
        case Paused():
            kept = [(i, w) for i, w in enumerate(state.waves) if isinstance(w, TakenBack | Over)]
            return tuple(c for i, w in kept for c in waves.pending_commands(state.facts, i, w))
        case RolledBack(facts=facts, restored=restored):
            return waves.take_back(facts, holders(state) - restored)
        case Superseded():
            return _to_settle(state)
        case _:
            return ()


def _of_waves(state: Rolling) -> Commands:
    return tuple(c for i, w in enumerate(state.waves) for c in waves.pending_commands(state.facts, i, w))


def _alarm(state: Rolling | Completed) -> Commands:
    due = state.due
    return () if due is None else (SetAlarm("rollout", state.facts.rollout, alarm_key(state), due),)


def _taken_back(state: Completed) -> Commands:
    taken = [(i, w) for i, w in enumerate(state.waves) if isinstance(w, TakenBack)]
    return tuple(c for i, w in taken for c in waves.pending_commands(state.facts, i, w))


def _to_settle(state: Completed | Superseded) -> Commands:
    names = sorted({kept.node for kept in kept_states(state)} - state.settled)
    parts = [names[i : i + SETTLED_TOGETHER] for i in range(0, len(names), SETTLED_TOGETHER)]
    return tuple(SettleNodes(state.facts.rollout, tuple(part)) for part in parts)


def kept_states(state: Rollout) -> tuple[SetDesired, ...]:
    """What the nodes of a roll-out that is over keep, and are no longer watched for."""
    match state:
        case Completed(facts=facts):
            return tuple(waves.settle(facts, n, s) for n, s in nodes_of(state).items() if waves.is_settled(s))
        case Superseded(facts=facts):
            # Nodes that have the release and are not in the newer roll-out keep it.
            return tuple(waves.settle(facts, n, s) for n, s in nodes_of(state).items() if s.phase == "confirmed")
        case _:
            return ()


Step = tuple[Rollout, Commands]


def step(state: Rollout | None, event: RolloutEvent, at: datetime, decisions: Decisions) -> Step:
    """The roll-out after `event`; a change of state that is not in `TRANSITIONS` is a bug.

    Raises:
        InvalidTransition: it was started twice or never, or its state does not allow the action.
    """
    after, commands = _step(state, event, at, decisions)
    check_transition(TRANSITIONS, state, after)
    return after, commands


def _step(state: Rollout | None, event: RolloutEvent, at: datetime, decisions: Decisions) -> Step:
    if isinstance(event, RolloutStarted):
        if state is not None:
            raise InvalidTransition(f"roll-out {event.rollout} was started twice")
        facts = RolloutFacts(event.rollout, event.plan, event.counter, event.by, at, event.trace)
        return _advance_until_stable(Rolling(facts, tuple(Waiting() for _ in event.plan.waves)), at, decisions)
    if state is None:
        name = event.id if isinstance(event, AlarmRang) else event.rollout
        raise InvalidTransition(f"{event.kind} for a roll-out {name} that was never started")
    match event:
        case AlarmRang(key=key):
            if isinstance(state, Rolling | Completed) and key == alarm_key(state):
                return _advance_until_stable(replace(state, alarms=state.alarms + 1, due=None, dues=()), at, decisions)
            return state, ()
        case NodePhaseReported() | NodeMeasured() | RegionCached() | QueryAnswered():
            return _take(state, event, at, decisions)
        case RegionCacheFailed():
            return _cannot_cache(state, event)
        case RolloutSettled(nodes=nodes):
            if isinstance(state, Completed | Superseded):
                return replace(state, settled=state.settled.union(nodes)), ()
            return state, ()
        case _:
            return apply_action(state, event, at, decisions)


def returned(state: Rollout, node: Node, at: datetime, decisions: Decisions) -> Step:
    """A node joined or came back."""
    match state:
        case Rolling() | Completed(stopped=""):
            changed = catch_up.returned(state.facts, state.waves, node, at)
            return (
                (state, ())
                if changed == state.waves
                else _advance_until_stable(replace(state, waves=changed), at, decisions, state.waves)
            )
        case Paused(at=inner):
            changed = catch_up.returned(state.facts, state.waves, node, at)
            return replace(state, at=replace(inner, waves=changed)), ()
        case RolledBack(followed=False) if state.facts.plan.fallback is not None:
            changed = catch_up.joined_afterwards(state.facts, state.waves, node, at)
            if changed == state.waves:
                return state, ()
            return replace(state, waves=changed), waves.take_back(state.facts, [node.name])
        case _:
            return state, ()


def _take(state: Rollout, event: Report, at: datetime, decisions: Decisions) -> Step:
    match state:
        case RolledBack():
            return _gone_back(state, event), ()
        case Superseded():
            return state, ()
        case Completed(stopped=stopped) if stopped:
            return replace(state, waves=waves.reported(state.facts, state.waves, event, at)), ()
        case Rolling() | Completed():
            noted = waves.reported(state.facts, state.waves, event, at)
            return (
                (state, ())
                if noted is state.waves
                else _advance_until_stable(replace(state, waves=noted), at, decisions, state.waves)
            )
        case Paused(at=inner):
            noted = waves.reported(state.facts, inner.waves, event, at)
            if noted is inner.waves:
                return state, ()
            return _watch(replace(state, at=replace(inner, waves=noted)), at, decisions)


def _gone_back(state: RolledBack, event: Report) -> RolledBack:
    if not isinstance(event, NodePhaseReported) or event.counter <= state.facts.counter:
        return state
    if event.phase == "confirmed" and event.node not in state.restored:
        stuck = {n: why for n, why in state.stuck.items() if n != event.node}
        return replace(state, restored=state.restored | {event.node}, stuck=stuck)
    if event.phase in waves.FAILED and event.node not in state.restored:
        return replace(state, stuck={**state.stuck, event.node: event.reason})
    return state


def _watch(state: Paused, at: datetime, decisions: Decisions) -> Step:
    """A paused roll-out decides nothing but a rollback; its deadlines do not expire."""
    plan = state.facts.plan
    for index, wave in enumerate(state.waves):
        if isinstance(wave, Offering | Baking) and plan.on_failure != "pause":
            failure = waves.what_failed(plan, index, wave, waves.decide(decisions, state.facts, index, wave))
            if failure is not None:
                return _fail(state.at, index, failure, at)
    return state, ()


def _advance_until_stable(
    state: Rolling | Completed, at: datetime, decisions: Decisions, before: tuple[Wave, ...] | None = None
) -> Step:
    """Apply what follows from the present state, until nothing more follows.

    Args:
        before: the earlier waves, if only the waves that have changed since need to be looked at.
    """
    commands = Commands()
    to_look = _others(state.waves, before)
    while isinstance(state, Rolling) and to_look:
        state, more = _open_waves(state, at)
        commands += more
        looking, to_look = to_look, []
        for index in looking:
            wave = state.waves[index]
            after, more, problem = waves.advance(state.facts, index, wave, at, decisions)
            commands += more
            state = _with_wave(state, index, after)
            if problem is not None:
                stopped, more = _fail(state, index, problem, at)
                return stopped, commands + more
            if type(after) is not type(wave) or (isinstance(after, Offering) and more):
                to_look.append(index)
    if isinstance(state, Rolling) and all(isinstance(w, Over | TakenBack) for w in state.waves):
        state = Completed(state.facts, state.waves, at, dues=state.dues)
        commands += _to_settle(state)
    changed, more, problem = catch_up.advance(state.facts, state.waves, at, decisions)
    state = replace(state, waves=changed)
    commands += more
    if isinstance(state, Completed):
        late = tuple(c.node for c in more if c.expires_at is None)
        commands += (SettleNodes(state.facts.rollout, late),) if late else ()
    if problem is not None:
        stopped, more = _stop_catch_up(state, problem, at)
        return stopped, commands + more
    return _with_alarm(state, commands, at, _others(state.waves, before if state.dues else None))


def _others(now: tuple[Wave, ...], before: tuple[Wave, ...] | None) -> list[int]:
    return [i for i, wave in enumerate(now) if before is None or wave is not before[i]]


def _open_waves(state: Rolling, at: datetime) -> tuple[Rolling, Commands]:
    plan, commands = state.facts.plan, Commands()
    group = state.group
    while group < max(w.group for w in plan.waves) and all(
        isinstance(w, Over | TakenBack) for p, w in zip(plan.waves, state.waves, strict=True) if p.group <= group
    ):
        group += 1
    state = replace(state, group=group)
    for index, wave in enumerate(state.waves):
        planned = plan.waves[index]
        if isinstance(wave, Waiting) and planned.group <= group and (wave.approved or not planned.approval):
            opened, more = waves.open_wave(state.facts, index, at)
            commands += more
            state = _with_wave(state, index, opened)
    return state, commands


def _with_wave(state: Rolling, index: int, wave: Wave) -> Rolling:
    if state.waves[index] is wave:
        return state
    check_transition(waves.TRANSITIONS, state.waves[index], wave)
    return replace(state, waves=(*state.waves[:index], wave, *state.waves[index + 1 :]))


def _with_alarm(state: Rolling | Completed, commands: Commands, at: datetime, changed: list[int]) -> Step:
    dues = list(state.dues or [None] * len(state.waves))
    for index in changed:
        dues[index] = waves.due(state.facts, index, state.waves[index], at)
    state = replace(state, dues=tuple(dues))
    due = min([*catch_up.due(state.facts, state.waves, at), *(d for d in dues if d is not None)], default=None)
    if due is None or due == state.due:
        return replace(state, due=due), commands
    return replace(state, due=due), (*commands, SetAlarm("rollout", state.facts.rollout, alarm_key(state), due))


def _fail(state: Rolling, index: int, problem: WaveProblem, at: datetime) -> Step:
    """Take the action that the plan prescribes for a problem in one wave."""
    facts = state.facts
    action = facts.plan.on_failure if problem.failed else "pause"
    if action == "rollback_all":
        return _roll_back(state, problem.reason, at)
    wave = state.waves[index]
    if action == "rollback_wave" and isinstance(wave, Offering | Baking):
        back = TakenBack(wave.cohort, problem.reason)
        return Paused(_with_wave(state, index, back), problem.reason), waves.pending_commands(facts, index, back)
    return Paused(state, problem.reason), ()


def _stop_catch_up(state: Rolling | Completed, problem: WaveProblem, at: datetime) -> Step:
    if state.facts.plan.on_failure == "rollback_all":
        return _roll_back(state, problem.reason, at)
    if isinstance(state, Rolling):
        return Paused(state, problem.reason), ()
    return replace(state, stopped=problem.reason, due=None), ()


def _roll_back(state: Rollout, reason: str, at: datetime) -> Step:
    back_already = [w.restored for w in state.waves if isinstance(w, TakenBack)]
    back = RolledBack(state.facts, state.waves, reason, at, frozenset().union(*back_already))
    return back, pending_commands(back)


def lost(state: Rollout, node: str, at: datetime, decisions: Decisions) -> Step:
    """A node went offline."""
    match state:
        case Rolling():
            changed = catch_up.lost(state.waves, node)
            return (
                (state, ())
                if changed == state.waves
                else _advance_until_stable(replace(state, waves=changed), at, decisions, state.waves)
            )
        case Paused(at=inner):
            return replace(state, at=replace(inner, waves=catch_up.lost(inner.waves, node))), ()
        case _:
            return state, ()


def _cannot_cache(state: Rollout, event: RegionCacheFailed) -> Step:
    regions = [w.region for w in state.facts.plan.waves]
    if not isinstance(state, Rolling) or event.region not in regions:
        return state, ()
    if not isinstance(state.waves[regions.index(event.region)], Caching):
        return state, ()
    return Paused(state, f"{event.region}: its leaf cannot get the release: {event.reason}"), ()


def action_of(event: RolloutAction) -> RolloutActionName:
    """What a person asked for."""
    match event:
        case RolloutAbortRequested():
            return "abort"
        case RolloutRollbackRequested():
            return "rollback"
        case RolloutPauseRequested():
            return "pause"
        case RolloutResumeRequested():
            return "resume"
        case RolloutPromoteRequested():
            return "promote"
        case RolloutNextRequested():
            return "next"
        case RolloutRetryRequested():
            return "retry"


def apply_action(state: Rollout, event: RolloutAction, at: datetime, decisions: Decisions) -> Step:
    """What a person asked for, if `ACTIONS` allows it in this state.

    Raises:
        InvalidTransition: it does not, or there is nothing that it could change.
    """
    action = action_of(event)
    if type(state) in ACTIONS[action]:
        applied = _stop(state, event, at) or _go_on(state, event, at, decisions)
        if applied is not None:
            return applied
    raise InvalidTransition(f"roll-out {event.rollout} is {state_name(state)}, which `{action}` cannot change")


def _stop(state: Rollout, event: RolloutAction, at: datetime) -> Step | None:
    match event, state:
        case RolloutAbortRequested(reason=reason), Rolling() | Paused():
            return _roll_back(state, f"aborted: {reason}", at)
        case RolloutRollbackRequested(reason=reason), Rolling() | Paused() | Completed(followed=False):
            return _roll_back(state, f"rolled back: {reason}", at)
        case RolloutPauseRequested(reason=reason), Rolling():
            return Paused(state, f"paused: {reason}"), ()
        case RolloutPauseRequested(), Paused():
            return state, ()
        case _:
            return None


def _go_on(state: Rollout, event: RolloutAction, at: datetime, decisions: Decisions) -> Step | None:
    match event, state:
        case RolloutResumeRequested(), Completed(followed=False, stopped=stopped) if stopped:
            return _advance_until_stable(replace(state, stopped="", due=None, dues=()), at, decisions)
        case RolloutResumeRequested(), Paused(at=inner):
            with_restarted_deadlines = waves.with_restarted_deadlines(inner.waves, at)
            resumed, commands = _advance_until_stable(
                replace(inner, waves=with_restarted_deadlines, due=None, dues=()), at, decisions
            )
            return resumed, pending_commands(resumed) or commands
        case RolloutPromoteRequested(region=region), Rolling() | Paused():
            rolling, ready = _ready(state, at)
            assert isinstance(rolling, Rolling)
            paused = isinstance(state, Paused)
            changed = waves.promoted(state.facts, ready, rolling.group, region, paused=paused)
            return _advance_until_stable(replace(rolling, waves=changed, due=None, dues=()), at, decisions)
        case RolloutNextRequested(), Rolling(group=group) if group < max(w.group for w in state.facts.plan.waves):
            return _advance_until_stable(replace(state, group=group + 1, dues=()), at, decisions)
        case RolloutRetryRequested(counter=counter), Rolling() | Paused() | Completed(followed=False):
            tried, ready = _ready(state, at)
            facts = replace(tried.facts, counter=counter)
            changed, commands = waves.retried(facts, ready, at)
            tried = replace(tried, stopped="") if isinstance(tried, Completed) else tried
            settled, more = _advance_until_stable(
                replace(tried, facts=facts, waves=changed, due=None, dues=()), at, decisions
            )
            return settled, commands + more
        case _:
            return None


def _ready(state: Rolling | Paused | Completed, at: datetime) -> tuple[Rolling | Completed, tuple[Wave, ...]]:
    """The roll-out to continue, and its waves: with restarted deadlines if it was paused."""
    if isinstance(state, Paused):
        return state.at, waves.with_restarted_deadlines(state.waves, at)
    return state, state.waves
