"""A roll-out: one release to a fleet, wave by wave (`waves`), and back when it is worse.

    (none) --RolloutStarted--> Rolling --every wave over--> Completed
                                  |  \\\\--a gate that cannot decide, or a person--> Paused --resume--> Rolling
                                  \\\\--errors, a failed gate, or a person--> RolledBack

Waves of one group go side by side, groups one after the other. Nodes that were away are served by
the catch-up cohort, also after the roll-out is completed. Pure; times come from the events.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime

from coordinator import catch_up, wave_steps, wave_wishes, waves
from coordinator.commands import Commands, SetAlarm
from coordinator.fleet import Node
from coordinator.waves import Baking, Facts, NodeState, Offering, Over, Report, TakenBack, Trouble, Waiting, Wave
from fabric.blobs import BlobRef
from fabric.errors import InvalidTransition
from fabric.events import (
    AlarmRang,
    NodeMeasured,
    NodePhaseReported,
    RegionCached,
    RolloutAbortRequested,
    RolloutNextRequested,
    RolloutPauseRequested,
    RolloutPromoteRequested,
    RolloutResumeRequested,
    RolloutRetryRequested,
    RolloutRollbackRequested,
    RolloutStarted,
)

Wish = (
    RolloutAbortRequested
    | RolloutRollbackRequested
    | RolloutPauseRequested
    | RolloutResumeRequested
    | RolloutPromoteRequested
    | RolloutNextRequested
    | RolloutRetryRequested
)
RolloutEvent = RolloutStarted | Report | Wish | AlarmRang


@dataclass(frozen=True, slots=True)
class Rolling:
    """`group`: waves up to this one may be under way. `alarms`: how many have rung."""

    facts: Facts
    waves: tuple[Wave, ...]
    group: int = 0
    alarms: int = 0
    due: datetime | None = None


@dataclass(frozen=True, slots=True)
class Paused:
    """Nothing is offered and nothing decided, but what nodes report is noted, and errors still take it back."""

    at: Rolling
    reason: str

    @property
    def facts(self) -> Facts:
        return self.at.facts

    @property
    def waves(self) -> tuple[Wave, ...]:
        return self.at.waves


@dataclass(frozen=True, slots=True)
class Completed:
    """Every wave is over; nodes that come back are still served, unless that was `stopped` for a reason."""

    facts: Facts
    waves: tuple[Wave, ...]
    ended_at: datetime
    stopped: str = ""
    alarms: int = 0
    due: datetime | None = None


@dataclass(frozen=True, slots=True)
class RolledBack:
    """Every node that was offered the release is told to serve the previous one, under a higher counter."""

    facts: Facts
    waves: tuple[Wave, ...]
    reason: str
    at: datetime
    restored: frozenset[str] = field(default_factory=frozenset)


@dataclass(frozen=True, slots=True)
class Superseded:
    facts: Facts
    waves: tuple[Wave, ...]
    by: str


Rollout = Rolling | Paused | Completed | RolledBack | Superseded
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
                return _settle(replace(state, alarms=state.alarms + 1, due=None), at)
            return state, ()
        case NodePhaseReported() | NodeMeasured() | RegionCached():
            return _take(state, event, at)
        case _:
            return _obey(state, event, at)


def returned(state: Rollout, node: Node, at: datetime) -> Step:
    """A node joined or came back."""
    match state:
        case Rolling() | Completed(stopped=""):
            changed = catch_up.returned(state.facts, state.waves, node, at)
            return (state, ()) if changed == state.waves else _settle(replace(state, waves=changed), at)
        case Paused(at=inner):
            changed = catch_up.returned(state.facts, state.waves, node, at)
            return replace(state, at=replace(inner, waves=changed)), ()
        case _:
            return state, ()


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
            return replace(state, stopped=f"superseded by {by}", due=None)
        case RolledBack():
            # What it still owes absent nodes is now the newer one's to say.
            return replace(state, restored=frozenset(nodes_of(state)))
        case _:
            return state


def nodes_of(state: Rollout) -> Mapping[str, NodeState]:
    """Every node that was offered the release so far, or waits in the catch-up cohort."""
    return {name: known for wave in state.waves for name, known in waves.nodes_of(wave).items()}


def holders(state: Rollout) -> frozenset[str]:
    """The nodes that were offered the release, and may have it."""
    return frozenset(n for n, s in nodes_of(state).items() if not (s.back and not s.claimed))


def is_open(state: Rollout) -> bool:
    return isinstance(state, Rolling | Paused)


def wants_alarm(state: Rollout, key: str) -> bool:
    return isinstance(state, Rolling | Completed) and state.due is not None and key == alarm_key(state)


def alarm_key(state: Rolling | Completed) -> str:
    return f"{type(state).__name__.lower()}-{state.alarms}"


def _take(state: Rollout, event: Report, at: datetime) -> Step:
    match state:
        case RolledBack(restored=restored):
            if not isinstance(event, NodePhaseReported) or event.phase != "confirmed":
                return state, ()
            if event.node in restored or event.counter <= state.facts.counter:
                return state, ()
            return replace(state, restored=restored | {event.node}), ()
        case Superseded():
            return state, ()
        case Completed(stopped=stopped) if stopped:
            return replace(state, waves=waves.reported(state.facts, state.waves, event, at)), ()
        case Rolling() | Completed():
            noted = waves.reported(state.facts, state.waves, event, at)
            return (state, ()) if noted is state.waves else _settle(replace(state, waves=noted), at)
        case Paused(at=inner):
            noted = waves.reported(state.facts, inner.waves, event, at)
            if noted is inner.waves:
                return state, ()
            return _watch(replace(state, at=replace(inner, waves=noted)), at)


def _watch(state: Paused, at: datetime) -> Step:
    """A paused roll-out decides nothing, except that it is taken back."""
    plan = state.facts.plan
    for index, wave in enumerate(state.waves):
        if isinstance(wave, Offering | Baking) and plan.on_failure != "pause":
            _, _, trouble = wave_steps.advance(state.facts, index, wave, at)
            if trouble is not None and trouble.failed:
                return _fail(state.at, index, trouble, at)
    return state, ()


def _settle(state: Rolling | Completed, at: datetime) -> Step:
    """Whatever follows from the state as it is now, until nothing more does."""
    before, commands = state, Commands()
    moved = True
    while isinstance(state, Rolling) and moved:
        state, more = _open_waves(state, at)
        commands += more
        moved = False
        for index, wave in enumerate(state.waves):
            after, more, trouble = wave_steps.advance(state.facts, index, wave, at)
            commands += more
            state = _with_wave(state, index, after)
            if trouble is not None:
                stopped, more = _fail(state, index, trouble, at)
                return stopped, commands + more
            moved = moved or type(after) is not type(wave) or (isinstance(after, Offering) and bool(more))
    if isinstance(state, Rolling) and all(isinstance(w, Over | TakenBack) for w in state.waves):
        state = Completed(state.facts, state.waves, at)
    changed, more, trouble = catch_up.advance(state.facts, state.waves, at)
    state = replace(state, waves=changed)
    commands += more + catch_up.settled(state.facts, before.waves, changed)
    if trouble is not None:
        stopped, more = _stop_catch_up(state, trouble, at)
        return stopped, commands + more
    return _with_alarm(state, commands, at)


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


def _with_alarm(state: Rolling | Completed, commands: Commands, at: datetime) -> Step:
    due = _due(state, at)
    if due is None or due == state.due:
        return replace(state, due=due), commands
    return replace(state, due=due), (*commands, SetAlarm("rollout", state.facts.rollout, alarm_key(state), due))


def _due(state: Rolling | Completed, at: datetime) -> datetime | None:
    times = catch_up.due(state.facts, state.waves, at)
    times += [d for i, w in enumerate(state.waves) if (d := wave_steps.due(state.facts, i, w, at)) is not None]
    return min(times, default=None)


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
    back = RolledBack(state.facts, state.waves, reason, at)
    return back, owed(back)


def _obey(state: Rollout, event: Wish, at: datetime) -> Step:
    """A person's wish; which states allow which stands here and nowhere else."""
    match event, state:
        case RolloutAbortRequested(reason=reason), Rolling() | Paused():
            return _roll_back(state, f"aborted: {reason}", at)
        case RolloutRollbackRequested(reason=reason), Rolling() | Paused():
            return _roll_back(state, f"rolled back: {reason}", at)
        case RolloutRollbackRequested(reason=reason), Completed(stopped=stopped) if "superseded" not in stopped:
            return _roll_back(state, f"rolled back: {reason}", at)
        case RolloutPauseRequested(reason=reason), Rolling():
            return Paused(state, f"paused: {reason}"), ()
        case RolloutPauseRequested(), Paused():
            return state, ()
        case RolloutResumeRequested(), Paused(at=inner):
            resumed, commands = _settle(replace(inner, waves=wave_wishes.patient(inner.waves, at), due=None), at)
            return resumed, owed(resumed) or commands
        case RolloutPromoteRequested(region=region), Rolling() | Paused():
            inner = state if isinstance(state, Rolling) else state.at
            changed = wave_wishes.promoted(state.facts, inner.waves, inner.group, region)
            return _settle(replace(inner, waves=changed, due=None), at)
        case RolloutNextRequested(), Rolling(group=group) if group < max(w.group for w in state.facts.plan.waves):
            return _settle(replace(state, group=group + 1), at)
        case RolloutRetryRequested(counter=counter), Rolling() | Paused() | Completed(stopped=""):
            again = state.at if isinstance(state, Paused) else state
            facts = replace(again.facts, counter=counter)
            changed, offers = wave_wishes.retried(facts, again.waves, at)
            settled, more = _settle(replace(again, facts=facts, waves=changed, due=None), at)
            return settled, offers + more
        case _:
            wish = event.kind.removeprefix("rollout.").removesuffix("_requested")
            what = type(state).__name__.lower()
            raise InvalidTransition(f"roll-out {event.rollout} is {what}: there is nothing to {wish}")


def owed(state: Rollout) -> Commands:
    """What this state still wants done: issued on entry, and again after a restart."""
    match state:
        case Rolling() | Completed(stopped=""):
            due = () if state.due is None else (SetAlarm("rollout", state.facts.rollout, alarm_key(state), state.due),)
            return (*(c for i, w in enumerate(state.waves) for c in waves.owed(state.facts, i, w)), *due)
        case Paused():
            kept = [(i, w) for i, w in enumerate(state.waves) if isinstance(w, TakenBack | Over)]
            return tuple(c for i, w in kept for c in waves.owed(state.facts, i, w))
        case RolledBack(facts=facts, restored=restored):
            return waves.take_back(facts, holders(state) - restored)
        case _:
            return ()
