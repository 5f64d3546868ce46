"""The catch-up cohort: nodes that were away when their wave went by, or joined later.

They are offered the release once their wave is over and they are back: few at a time, watched for
as long as canaries are, and under the same error threshold and gates as everybody. Pure.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import datetime

from fedtide.coordinator.commands import SetDesired
from fedtide.coordinator.decisions import Decisions
from fedtide.coordinator.fleet.fleet import Node, matches
from fedtide.coordinator.rollouts import gates, waves
from fedtide.coordinator.rollouts.waves import ENDED, Baking, NodeState, Offering, Over, RolloutFacts, Wave, WaveProblem
from fedtide.fabric.plans.rollout_plan import RolloutPlan
from fedtide.fabric.times import later

Waves = tuple[Wave, ...]


def returned(facts: RolloutFacts, all_waves: Waves, node: Node, at: datetime) -> Waves:
    """A node is online (again): if it missed its wave, it waits for its turn from now on."""
    changed = list(all_waves)
    for index, wave in enumerate(all_waves):
        state = waves.nodes_of(wave).get(node.name)
        if state is not None:
            there = replace(state, away=False, back=state.back or waves.is_absent(state))
            if there != state:
                changed[index] = waves.with_nodes(wave, {node.name: there})
            return tuple(changed)
    return _with_newcomer(facts, all_waves, node, NodeState("timed_out", "catch_up", facts.counter, at, back=True))


def joined_afterwards(facts: RolloutFacts, all_waves: Waves, node: Node, at: datetime) -> Waves:
    """A node that joined after the release was taken back is told what the others went back to."""
    if any(node.name in waves.nodes_of(wave) for wave in all_waves):
        return all_waves
    return _with_newcomer(facts, all_waves, node, NodeState("superseded", "catch_up", facts.counter, at))


def _with_newcomer(facts: RolloutFacts, all_waves: Waves, node: Node, state: NodeState) -> Waves:
    planned = any(node.name in w.canaries or node.name in w.nodes for w in facts.plan.waves)
    if planned or not matches(node, facts.plan.selector):
        return all_waves
    changed = list(all_waves)
    for index, wave in enumerate(all_waves):
        if facts.plan.waves[index].region == node.region and isinstance(wave, Offering | Baking | Over):
            changed[index] = waves.with_nodes(wave, {node.name: replace(state, reason="joined later")})
            return tuple(changed)
    return all_waves


def lost(all_waves: Waves, node: str) -> Waves:
    """A node went offline: if it has confirmed, mark it, since it no longer shows whether the release is good."""
    changed = list(all_waves)
    for index, wave in enumerate(all_waves):
        state = waves.nodes_of(wave).get(node)
        if state is not None and state.phase == "confirmed" and isinstance(wave, Offering | Baking):
            changed[index] = waves.with_nodes(wave, {node: replace(state, away=True)})
    return tuple(changed)


def advance(
    facts: RolloutFacts, all_waves: Waves, at: datetime, decisions: Decisions
) -> tuple[Waves, tuple[SetDesired, ...], WaveProblem | None]:
    """Offer the release to nodes that are back, as many at a time as the plan allows; watch them like canaries."""
    if not any(wave.cohort.late for _, wave in _over(all_waves)):
        return all_waves, (), None
    plan, changed = facts.plan, list(all_waves)
    for index, wave in _over(all_waves):
        late = {n: wave.cohort.nodes[n] for n in wave.cohort.late if not wave.cohort.nodes[n].back}
        changed[index] = waves.with_nodes(wave, waves.expired(plan, late, at))
    if reason := _what_is_wrong(facts, changed, decisions):
        return tuple(changed), (), WaveProblem(f"catch-up: {reason}", failed=True)
    commands: tuple[SetDesired, ...] = ()
    for index, name, state in list(_cohort(changed)):
        if state.phase == "confirmed" and not state.settled and at >= _watched_until(plan, state):
            changed[index] = waves.with_nodes(changed[index], {name: replace(state, settled=True)})
            commands += (waves.settle(facts, name, state),)
    free = plan.catch_up_in_flight - sum(_is_under_way(s) for _, _, s in _cohort(changed))
    for index, name, _ in _waiting(changed):
        if free > 0 and waves.may_activate(plan, name, at):
            free -= 1
            fresh = NodeState("offered", "catch_up", facts.counter, at)
            changed[index] = waves.with_nodes(changed[index], {name: fresh})
            commands += (waves.offer(facts, name, fresh),)
    return tuple(changed), commands, None


def _what_is_wrong(facts: RolloutFacts, all_waves: Sequence[Wave], decisions: Decisions) -> str:
    """The error rate counts all nodes that attempted the release; gates judge only the late nodes and can only fail."""
    plan, late = facts.plan, {name: state for _, name, state in _cohort(all_waves)}
    if any(waves.is_failed(state) for state in late.values()):
        everybody = [s for _, wave in _over(all_waves) for s in wave.cohort.nodes.values()]
        if reason := waves.too_many_errors(plan, everybody):
            return reason
    serving = {n: s.measured for n, s in late.items() if s.phase == "confirmed" and s.measured is not None}
    if not serving or not plan.gates:
        return ""

    def judged() -> list[str]:
        found = [gates.judge(gate, serving, plan.slices) for gate in plan.gates]
        return [next((j.reason for j in found if j.outcome == "fail" and j.enforced), "")]

    return str(decisions.replay_or_decide(f"gates/{facts.rollout}/catch-up", judged)[0])


def _is_under_way(state: NodeState) -> bool:
    return state.phase not in ENDED or (state.phase == "confirmed" and not state.settled)


def _watched_until(plan: RolloutPlan, state: NodeState) -> datetime:
    assert state.since is not None
    return later(state.since, plan.bake.seconds)


def due(facts: RolloutFacts, all_waves: Waves, at: datetime) -> list[datetime]:
    plan, times = facts.plan, []
    for _, name, state in _cohort(all_waves):
        if state.phase not in ENDED:
            times.append(waves.deadline(plan, name, state, at))
        elif state.phase == "confirmed" and not state.settled:
            times.append(_watched_until(plan, state))
    times += waves.next_openings(plan, [n for _, n, _ in _waiting(all_waves)], at)
    return [time for time in times if time > at]


def _over(all_waves: Sequence[Wave]) -> Iterator[tuple[int, Over]]:
    return ((i, w) for i, w in enumerate(all_waves) if isinstance(w, Over))


def _late(all_waves: Sequence[Wave]) -> Iterator[tuple[int, str, NodeState]]:
    return ((i, n, w.cohort.nodes[n]) for i, w in _over(all_waves) for n in sorted(w.cohort.late))


def _cohort(all_waves: Sequence[Wave]) -> Iterator[tuple[int, str, NodeState]]:
    return ((i, n, s) for i, n, s in _late(all_waves) if s.stage == "catch_up" and not s.back)


def _waiting(all_waves: Sequence[Wave]) -> list[tuple[int, str, NodeState]]:
    return [(i, n, s) for i, n, s in _late(all_waves) if s.back]
