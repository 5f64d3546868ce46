"""What follows for a wave from what its nodes reported and from the time: offers, bakes, gates, deadlines.

Order of judgement, each time something is reported: error threshold and failed gates, what is
inconclusive, success. The denominator is the nodes that attempted (reached an end, or took the
release and got stuck); one that did not take its offer by the claim deadline leaves the wave for
the catch-up cohort. "Everything has ended" alone never promotes. Pure; times come from the events.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from datetime import datetime, timedelta

from fedtide.coordinator.commands import Commands
from fedtide.coordinator.rollouts import gates
from fedtide.coordinator.rollouts.gates import Judgement
from fedtide.coordinator.rollouts.waves import (
    ENDED,
    Baking,
    Caching,
    Facts,
    NodeState,
    Offering,
    Over,
    Staged,
    Trouble,
    Wave,
    is_failed,
    members,
    offer,
    settle,
    with_nodes,
)
from fedtide.fabric.plans.rollout_plan import RolloutPlan
from fedtide.fabric.plans.windows import is_open, opening, opens_at

Progress = tuple[Wave, Commands, Trouble | None]


def too_many_errors(plan: RolloutPlan, states: Iterable[NodeState]) -> str:
    """Why the error threshold is passed, or nothing."""
    known = list(states)
    failed = [s for s in known if is_failed(s)]
    attempted = len(failed) + sum(s.phase == "confirmed" for s in known)
    if attempted < plan.min_attempted or not failed or len(failed) / attempted <= plan.max_error:
        return ""
    share = f"{len(failed)} of {attempted} attempted nodes failed, allowed are {plan.max_error:.0%}"
    return f"{share}; first reason: {failed[0].reason or failed[0].phase}"


def judge(plan: RolloutPlan, wave: Staged) -> list[Judgement]:
    """Every gate of the plan over the nodes of the stage that serve the release."""
    if not plan.gates:
        return []
    serving = {n: s.measured or gates.NOTHING for n, s in members(wave).items() if s.phase == "confirmed"}
    return [gates.judge(gate, serving, plan.slices) for gate in plan.gates]


def advance(facts: Facts, index: int, wave: Wave, at: datetime) -> Progress:
    """What follows from the wave as it is at `at`."""
    plan, where = facts.plan, facts.plan.waves[index].region
    if isinstance(wave, Caching) and at >= wave.since + timedelta(seconds=plan.cache_deadline_s):
        reason = f"{where}: its leaf has not got the release within {plan.cache_deadline_s:g} s; is it connected?"
        return wave, (), Trouble(reason, failed=False)
    if not isinstance(wave, Offering | Baking):
        return wave, (), None
    wave = with_nodes(wave, expired(plan, wave.cohort.nodes, at))
    judged = judge(plan, wave)
    if (failure := what_failed(plan, index, wave, judged)) is not None:
        return wave, (), failure
    if isinstance(wave, Offering):
        return _offer(facts, f"{where}, {wave.stage}", wave, at)
    return _bake(facts, index, wave, judged, at)


def what_failed(plan: RolloutPlan, index: int, wave: Staged, judged: list[Judgement]) -> Trouble | None:
    """Too many errors, or a gate that fails: what the plan's action follows on."""
    here = f"{plan.waves[index].region}, {wave.stage}"
    if reason := too_many_errors(plan, members(wave).values()):
        return Trouble(f"{here}: {reason}", failed=True)
    bad = next((j for j in judged if j.outcome == "fail" and j.enforced), None)
    return None if bad is None or wave.waived else Trouble(f"{here}: {bad.reason}", failed=True)


def _offer(facts: Facts, here: str, wave: Offering, at: datetime) -> Progress:
    plan = facts.plan
    wave = _with_allowance(plan, wave, at)
    free = plan.rate.in_flight - sum(s.phase not in ENDED for s in wave.cohort.nodes.values())
    if plan.rate.per_minute is not None:
        free = min(free, int(wave.allowance + 1e-9))
    chosen = [n for n in wave.queue if may_activate(plan, n, at)][: max(0, free)]
    if chosen:
        fresh = {n: NodeState("offered", wave.stage, facts.counter, at) for n in chosen}
        left = tuple(n for n in wave.queue if n not in fresh)
        wave = replace(wave, queue=left, allowance=wave.allowance - len(chosen))
        cohort = replace(wave.cohort, nodes={**wave.cohort.nodes, **fresh})
        return replace(wave, cohort=cohort), tuple(offer(facts, n, s) for n, s in fresh.items()), None
    known = members(wave)
    if wave.queue or any(s.phase not in ENDED for s in known.values()):
        return wave, (), None
    confirmed = sum(s.phase == "confirmed" for s in known.values())
    attempted = confirmed + sum(is_failed(s) for s in known.values())
    if attempted < plan.min_attempted:
        reason = f"{here}: {attempted} nodes attempted, the gates need {plan.min_attempted}"
        return wave, (), Trouble(reason, failed=False)
    if confirmed / attempted < plan.min_success:
        reason = f"{here}: {confirmed} of {attempted} confirmed, required are {plan.min_success:.0%}"
        return wave, (), Trouble(reason, failed=False)
    return Baking(wave.stage, wave.cohort, at, wave.waived), (), None


def _bake(facts: Facts, index: int, wave: Baking, judged: list[Judgement], at: datetime) -> Progress:
    plan = facts.plan
    here = f"{plan.waves[index].region}, {wave.stage}"
    over = at >= bake_ends(plan, index, wave)
    if not wave.waived:
        enforced = [j for j in judged if j.enforced]
        if not over or inferences(wave) < wanted_inferences(plan, index, wave):
            return wave, (), _late(plan, index, wave, at, f"{inferences(wave)} inferences so far")
        gone = sorted(n for n, s in members(wave).items() if s.away)
        if gone and wave.stage == "canary":
            return wave, (), _late(plan, index, wave, at, f"{gone[0]} is away since it confirmed")
        broken = next((j for j in enforced if j.outcome == "error"), None)
        if broken is not None:
            return wave, (), Trouble(f"{here}: cannot be judged, {broken.reason}", failed=False)
        open_ = next((j for j in enforced if j.outcome != "pass"), None)
        if open_ is not None:
            if plan.on_inconclusive == "pause":
                return wave, (), Trouble(f"{here}: {open_.reason}", failed=False)
            return wave, (), _late(plan, index, wave, at, open_.reason)
        if wave.stage == "canary" and plan.approve_after_canary:
            return wave, (), None
    return _next_stage(facts, index, wave, at)


def _late(plan: RolloutPlan, index: int, wave: Baking, at: datetime, reason: str) -> Trouble | None:
    limit = bake_ends(plan, index, wave) + timedelta(seconds=plan.gate_deadline_s)
    if at < limit:
        return None
    here = f"{plan.waves[index].region}, {wave.stage}"
    return Trouble(f"{here}: still undecided after {plan.gate_deadline_s:g} s: {reason}", failed=False)


def _next_stage(facts: Facts, index: int, wave: Baking, at: datetime) -> Progress:
    rest = facts.plan.waves[index].nodes
    if wave.stage == "canary" and rest:
        return Offering("rest", wave.cohort, tuple(rest), 1.0, at, wave.waived), (), None
    settled = tuple(settle(facts, n, s) for n, s in wave.cohort.nodes.items() if s.phase == "confirmed")
    # Who came back to an old offer while the others were watched goes on as a late one.
    on_the_way = {n: replace(s, stage="catch_up") for n, s in wave.cohort.nodes.items() if s.phase not in ENDED}
    seconds = (at - wave.cohort.opened_at).total_seconds()
    return Over(with_nodes(wave, on_the_way).cohort, seconds), settled, None


def _is_watched(plan: RolloutPlan, index: int, wave: Baking) -> bool:
    """The bake is spent on the canaries; a wave without canaries spends it at its end."""
    return wave.stage == "canary" or not plan.waves[index].canaries


def bake_ends(plan: RolloutPlan, index: int, wave: Baking) -> datetime:
    return wave.since + timedelta(seconds=plan.bake.seconds if _is_watched(plan, index, wave) else 0.0)


def wanted_inferences(plan: RolloutPlan, index: int, wave: Baking) -> int:
    return plan.bake.inferences if _is_watched(plan, index, wave) else 0


def inferences(wave: Staged) -> int:
    return sum(s.measured.inferences for s in members(wave).values() if s.measured is not None)


def _with_allowance(plan: RolloutPlan, wave: Offering, at: datetime) -> Offering:
    if plan.rate.per_minute is None:
        return wave
    minutes = (at - wave.counted_at).total_seconds() / 60
    allowance = min(float(len(wave.queue) or 1), wave.allowance + rate_now(plan, wave) * minutes)
    return replace(wave, allowance=allowance, counted_at=at)


def rate_now(plan: RolloutPlan, wave: Offering) -> float:
    """Nodes a minute: the base rate, grown with every confirmed node of the stage."""
    assert plan.rate.per_minute is not None
    confirmed = sum(s.phase == "confirmed" for s in wave.cohort.nodes.values() if s.stage == wave.stage)
    grown = plan.rate.per_minute * plan.rate.growth ** min(confirmed, 100)
    return min(grown, plan.rate.most_per_minute)


def expired(plan: RolloutPlan, nodes: Mapping[str, NodeState], at: datetime) -> dict[str, NodeState]:
    """The nodes whose deadline has passed, as they are then."""
    found = {}
    for name, state in nodes.items():
        if state.phase in ENDED or at < deadline(plan, name, state, at):
            continue
        reason = f"stuck in {state.phase}" if state.claimed else "did not take the release by the claim deadline"
        found[name] = replace(state, phase="timed_out", reason=reason)
    return found


def deadline(plan: RolloutPlan, name: str, state: NodeState, at: datetime) -> datetime:
    """When an offered node is given up. One that waits for its maintenance window is not stuck."""
    seconds = plan.finish_deadline_s if state.claimed else plan.claim_deadline_s
    start = state.offered_at
    if state.claimed and plan.terms.window is not None:
        start = max(start, opening(plan.terms.window, at, plan.timezones.get(name, "UTC")))
    return start + timedelta(seconds=seconds)


def may_activate(plan: RolloutPlan, name: str, at: datetime) -> bool:
    window = plan.terms.window
    return window is None or is_open(window, at, plan.timezones.get(name, "UTC"))


def due(facts: Facts, index: int, wave: Wave, at: datetime) -> datetime | None:
    """When something has to be looked at again though nothing is reported."""
    plan = facts.plan
    times: list[datetime] = []
    match wave:
        case Caching(since=since):
            times.append(since + timedelta(seconds=plan.cache_deadline_s))
        case Offering():
            if wave.queue and plan.rate.per_minute is not None and wave.allowance < 1:
                times.append(wave.counted_at + timedelta(minutes=(1 - wave.allowance) / rate_now(plan, wave)))
            times += next_openings(plan, wave.queue, at)
        case Baking():
            ends = bake_ends(plan, index, wave)
            times.append(ends if at < ends else ends + timedelta(seconds=plan.gate_deadline_s))
        case _:
            pass
    if isinstance(wave, Offering | Baking):
        times += [deadline(plan, n, s, at) for n, s in wave.cohort.nodes.items() if s.phase not in ENDED]
    # What is over was looked at just now, and waits for something else: a report, or a person.
    return min((time for time in times if time > at), default=None)


def next_openings(plan: RolloutPlan, names: Iterable[str], at: datetime) -> list[datetime]:
    window = plan.terms.window
    if window is None:
        return []
    zones = {plan.timezones.get(n, "UTC") for n in names if not may_activate(plan, n, at)}
    return [opens_at(window, at, each) for each in zones]
