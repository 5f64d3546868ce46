"""What follows for a roll-out from what is reported, asked for and from the time.

Waves of one group go side by side, groups one after the other. Nodes that were away are served by
the catch-up cohort, also after the roll-out is completed. Pure; times come from the events.
"""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime

from fedtide.coordinator.commands import Commands, SetAlarm
from fedtide.coordinator.fleet.fleet import Node
from fedtide.coordinator.rollouts import catch_up, wave_steps, wave_wishes, waves
from fedtide.coordinator.rollouts.rollouts import (
    Completed,
    Paused,
    RolledBack,
    Rolling,
    Rollout,
    RolloutEvent,
    Superseded,
    Wish,
    alarm_key,
    owed,
)
from fedtide.coordinator.rollouts.waves import (
    Baking,
    Caching,
    Facts,
    Offering,
    Over,
    Report,
    TakenBack,
    Trouble,
    Waiting,
    Wave,
)
from fedtide.fabric.errors import InvalidTransition
from fedtide.fabric.events.envelope import AlarmRang
from fedtide.fabric.events.rollouts import (
    NodeMeasured,
    NodePhaseReported,
    RegionCached,
    RegionCacheFailed,
    RolloutAbortRequested,
    RolloutNextRequested,
    RolloutPauseRequested,
    RolloutPromoteRequested,
    RolloutResumeRequested,
    RolloutRetryRequested,
    RolloutRollbackRequested,
    RolloutStarted,
)

Step = tuple[Rollout, Commands]


def step(state: Rollout | None, event: RolloutEvent, at: datetime) -> Step:
    """The roll-out after `event`.

    Raises:
        InvalidTransition: started twice, never, or a person's wish that its state does not allow.
    """
    if isinstance(event, RolloutStarted):
        if state is not None:
            raise InvalidTransition(f"roll-out {event.rollout} was started twice")
        facts = Facts(event.rollout, event.plan, event.counter, event.by, at)
        return _settle(Rolling(facts, tuple(Waiting() for _ in event.plan.waves)), at)
    if state is None:
        name = event.id if isinstance(event, AlarmRang) else event.rollout
        raise InvalidTransition(f"{event.kind} for a roll-out {name} that was never started")
    match event:
        case AlarmRang(key=key):
            if isinstance(state, Rolling | Completed) and key == alarm_key(state):
                return _settle(replace(state, alarms=state.alarms + 1, due=None, dues=()), at)
            return state, ()
        case NodePhaseReported() | NodeMeasured() | RegionCached():
            return _take(state, event, at)
        case RegionCacheFailed():
            return _cannot_cache(state, event)
        case _:
            return _obey(state, event, at)


def returned(state: Rollout, node: Node, at: datetime) -> Step:
    """A node joined or came back."""
    match state:
        case Rolling() | Completed(stopped=""):
            changed = catch_up.returned(state.facts, state.waves, node, at)
            return (state, ()) if changed == state.waves else _settle(replace(state, waves=changed), at, state.waves)
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


def _take(state: Rollout, event: Report, at: datetime) -> Step:
    match state:
        case RolledBack():
            return _gone_back(state, event), ()
        case Superseded():
            return state, ()
        case Completed(stopped=stopped) if stopped:
            return replace(state, waves=waves.reported(state.facts, state.waves, event, at)), ()
        case Rolling() | Completed():
            noted = waves.reported(state.facts, state.waves, event, at)
            return (state, ()) if noted is state.waves else _settle(replace(state, waves=noted), at, state.waves)
        case Paused(at=inner):
            noted = waves.reported(state.facts, inner.waves, event, at)
            if noted is inner.waves:
                return state, ()
            return _watch(replace(state, at=replace(inner, waves=noted)), at)


def _gone_back(state: RolledBack, event: Report) -> RolledBack:
    if not isinstance(event, NodePhaseReported) or event.counter <= state.facts.counter:
        return state
    if event.phase == "confirmed" and event.node not in state.restored:
        stuck = {n: why for n, why in state.stuck.items() if n != event.node}
        return replace(state, restored=state.restored | {event.node}, stuck=stuck)
    if event.phase in waves.FAILED and event.node not in state.restored:
        return replace(state, stuck={**state.stuck, event.node: event.reason})
    return state


def _watch(state: Paused, at: datetime) -> Step:
    """A paused roll-out decides nothing, except that it is taken back; deadlines do not run out in it."""
    plan = state.facts.plan
    for index, wave in enumerate(state.waves):
        if isinstance(wave, Offering | Baking) and plan.on_failure != "pause":
            failure = wave_steps.what_failed(plan, index, wave, wave_steps.judge(plan, wave))
            if failure is not None:
                return _fail(state.at, index, failure, at)
    return state, ()


def _settle(state: Rolling | Completed, at: datetime, before: tuple[Wave, ...] | None = None) -> Step:
    """Whatever follows from the state as it is now, until nothing more does.

    Args:
        before: the waves as they were, if only those that are others now need to be looked at.
    """
    commands = Commands()
    to_look = _others(state.waves, before)
    while isinstance(state, Rolling) and to_look:
        state, more = _open_waves(state, at)
        commands += more
        looking, to_look = to_look, []
        for index in looking:
            wave = state.waves[index]
            after, more, trouble = wave_steps.advance(state.facts, index, wave, at)
            commands += more
            state = _with_wave(state, index, after)
            if trouble is not None:
                stopped, more = _fail(state, index, trouble, at)
                return stopped, commands + more
            if type(after) is not type(wave) or (isinstance(after, Offering) and more):
                to_look.append(index)
    if isinstance(state, Rolling) and all(isinstance(w, Over | TakenBack) for w in state.waves):
        state = Completed(state.facts, state.waves, at, dues=state.dues)
    changed, more, trouble = catch_up.advance(state.facts, state.waves, at)
    state = replace(state, waves=changed)
    commands += more
    if trouble is not None:
        stopped, more = _stop_catch_up(state, trouble, at)
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
        told = plan.waves[index]
        if isinstance(wave, Waiting) and told.group <= group and (wave.approved or not told.approval):
            opened, more = waves.open_wave(state.facts, index, at)
            commands += more
            state = _with_wave(state, index, opened)
    return state, commands


def _with_wave(state: Rolling, index: int, wave: Wave) -> Rolling:
    if state.waves[index] is wave:
        return state
    return replace(state, waves=(*state.waves[:index], wave, *state.waves[index + 1 :]))


def _with_alarm(state: Rolling | Completed, commands: Commands, at: datetime, changed: list[int]) -> Step:
    dues = list(state.dues or [None] * len(state.waves))
    for index in changed:
        dues[index] = wave_steps.due(state.facts, index, state.waves[index], at)
    state = replace(state, dues=tuple(dues))
    due = min([*catch_up.due(state.facts, state.waves, at), *(d for d in dues if d is not None)], default=None)
    if due is None or due == state.due:
        return replace(state, due=due), commands
    return replace(state, due=due), (*commands, SetAlarm("rollout", state.facts.rollout, alarm_key(state), due))


def _fail(state: Rolling, index: int, trouble: Trouble, at: datetime) -> Step:
    """What the plan says about trouble in one wave."""
    facts = state.facts
    action = facts.plan.on_failure if trouble.failed else "pause"
    if action == "rollback_all":
        return _roll_back(state, trouble.reason, at)
    wave = state.waves[index]
    if action == "rollback_wave" and isinstance(wave, Offering | Baking):
        back = TakenBack(wave.cohort, trouble.reason)
        return Paused(_with_wave(state, index, back), trouble.reason), waves.owed(facts, index, back)
    return Paused(state, trouble.reason), ()


def _stop_catch_up(state: Rolling | Completed, trouble: Trouble, at: datetime) -> Step:
    if state.facts.plan.on_failure == "rollback_all":
        return _roll_back(state, trouble.reason, at)
    if isinstance(state, Rolling):
        return Paused(state, trouble.reason), ()
    return replace(state, stopped=trouble.reason, due=None), ()


def _roll_back(state: Rollout, reason: str, at: datetime) -> Step:
    back_already = [w.restored for w in state.waves if isinstance(w, TakenBack)]
    back = RolledBack(state.facts, state.waves, reason, at, frozenset().union(*back_already))
    return back, owed(back)


def lost(state: Rollout, node: str, at: datetime) -> Step:
    """A node went offline."""
    match state:
        case Rolling():
            changed = catch_up.lost(state.waves, node)
            return (state, ()) if changed == state.waves else _settle(replace(state, waves=changed), at, state.waves)
        case Paused(at=inner):
            return replace(state, at=replace(inner, waves=catch_up.lost(inner.waves, node))), ()
        case _:
            return state, ()


def _cannot_cache(state: Rollout, event: RegionCacheFailed) -> Step:
    told = [w.region for w in state.facts.plan.waves]
    if not isinstance(state, Rolling) or event.region not in told:
        return state, ()
    if not isinstance(state.waves[told.index(event.region)], Caching):
        return state, ()
    return Paused(state, f"{event.region}: its leaf cannot get the release: {event.reason}"), ()


def _obey(state: Rollout, event: Wish, at: datetime) -> Step:
    """A person's wish; which states allow which stands in these three functions and nowhere else."""
    obeyed = _stop(state, event, at) or _go_on(state, event, at)
    if obeyed is None:
        wish = event.kind.removeprefix("rollout.").removesuffix("_requested")
        what = type(state).__name__.lower()
        raise InvalidTransition(f"roll-out {event.rollout} is {what}, which `{wish}` cannot change")
    return obeyed


def _stop(state: Rollout, event: Wish, at: datetime) -> Step | None:
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


def _go_on(state: Rollout, event: Wish, at: datetime) -> Step | None:
    match event, state:
        case RolloutResumeRequested(), Completed(followed=False, stopped=stopped) if stopped:
            return _settle(replace(state, stopped="", due=None, dues=()), at)
        case RolloutResumeRequested(), Paused(at=inner):
            patient = wave_wishes.patient(inner.waves, at)
            resumed, commands = _settle(replace(inner, waves=patient, due=None, dues=()), at)
            return resumed, owed(resumed) or commands
        case RolloutPromoteRequested(region=region), Rolling() | Paused():
            rolling, ready = _ready(state, at)
            assert isinstance(rolling, Rolling)
            paused = isinstance(state, Paused)
            changed = wave_wishes.promoted(state.facts, ready, rolling.group, region, paused=paused)
            return _settle(replace(rolling, waves=changed, due=None, dues=()), at)
        case RolloutNextRequested(), Rolling(group=group) if group < max(w.group for w in state.facts.plan.waves):
            return _settle(replace(state, group=group + 1, dues=()), at)
        case RolloutRetryRequested(counter=counter), Rolling() | Paused() | Completed(followed=False):
            tried, ready = _ready(state, at)
            facts = replace(tried.facts, counter=counter)
            changed, commands = wave_wishes.retried(facts, ready, at)
            tried = replace(tried, stopped="") if isinstance(tried, Completed) else tried
            settled, more = _settle(replace(tried, facts=facts, waves=changed, due=None, dues=()), at)
            return settled, commands + more
        case _:
            return None


def _ready(state: Rolling | Paused | Completed, at: datetime) -> tuple[Rolling | Completed, tuple[Wave, ...]]:
    """What goes on, and its waves: with their deadlines anew if they were paused."""
    if isinstance(state, Paused):
        return state.at, wave_wishes.patient(state.waves, at)
    return state, state.waves
