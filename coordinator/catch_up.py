"""The catch-up cohort: nodes that were away when their wave went by, or joined later.

They are offered the release once their wave is over and they are back: few at a time, and under
the same error threshold as everybody. Pure.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import datetime

from coordinator import wave_steps, waves
from coordinator.commands import Commands
from coordinator.fleet import Node, matches
from coordinator.waves import ENDED, Facts, NodeState, Over, Trouble, Wave

Waves = tuple[Wave, ...]


def returned(facts: Facts, all_waves: Waves, node: Node, at: datetime) -> Waves:
    """A node is there (again): if it missed its wave, it waits for its turn from now on."""
    changed = list(all_waves)
    for index, wave in enumerate(all_waves):
        state = waves.nodes_of(wave).get(node.name)
        if state is not None:
            if waves.is_absent(state) and not state.back:
                changed[index] = waves.with_nodes(wave, {node.name: replace(state, back=True)})
            return tuple(changed)
    return _with_newcomer(facts, all_waves, node, NodeState("timed_out", "catch_up", facts.counter, at, back=True))


def joined_afterwards(facts: Facts, all_waves: Waves, node: Node, at: datetime) -> Waves:
    """A node that joined after the release was taken back is told what the others went back to."""
    if any(node.name in waves.nodes_of(wave) for wave in all_waves):
        return all_waves
    return _with_newcomer(facts, all_waves, node, NodeState("superseded", "catch_up", facts.counter, at))


def _with_newcomer(facts: Facts, all_waves: Waves, node: Node, state: NodeState) -> Waves:
    planned = any(node.name in w.canaries or node.name in w.nodes for w in facts.plan.waves)
    if planned or not matches(node, facts.plan.selector):
        return all_waves
    changed = list(all_waves)
    for index, wave in enumerate(all_waves):
        if facts.plan.waves[index].region == node.region and not isinstance(wave, waves.Waiting | waves.Caching):
            changed[index] = waves.with_nodes(wave, {node.name: replace(state, reason="joined later")})
            return tuple(changed)
    return all_waves


def advance(facts: Facts, all_waves: Waves, at: datetime) -> tuple[Waves, Commands, Trouble | None]:
    """Offer the release to nodes that are back, as many at a time as the plan says."""
    plan, changed = facts.plan, list(all_waves)
    for index, wave in _over(all_waves):
        late = {n: wave.cohort.nodes[n] for n in wave.cohort.late if not wave.cohort.nodes[n].back}
        changed[index] = waves.with_nodes(wave, wave_steps.expired(plan, late, at))
    cohort = [s for _, _, s in _cohort(changed)]
    if reason := wave_steps.too_many_errors(plan, cohort):
        return tuple(changed), (), Trouble(f"catch-up: {reason}", failed=True)
    free = plan.catch_up_in_flight - sum(s.phase not in ENDED for s in cohort)
    commands: Commands = ()
    for index, name, _ in _waiting(changed):
        if free > 0 and wave_steps.may_activate(plan, name, at):
            free -= 1
            fresh = NodeState("offered", "catch_up", facts.counter, at)
            changed[index] = waves.with_nodes(changed[index], {name: fresh})
            commands += (waves.offer(facts, name, fresh),)
    return tuple(changed), commands, None


def settled(facts: Facts, before: Waves, after: Waves) -> Commands:
    """Nodes of waves that are over which confirmed just now find the release without a deadline."""
    commands: Commands = ()
    for index, wave in _over(after):
        old = waves.nodes_of(before[index])
        if old is wave.cohort.nodes or not isinstance(before[index], Over):
            continue  # nothing new, or it was all said when the wave ended
        for name, state in wave.cohort.nodes.items():
            was = old.get(name)
            if state.phase == "confirmed" and was is not None and was.phase != "confirmed":
                commands += (waves.settle(facts, name, state),)
    return commands


def due(facts: Facts, all_waves: Waves, at: datetime) -> list[datetime]:
    plan = facts.plan
    times = [wave_steps.deadline(plan, n, s, at) for _, n, s in _cohort(all_waves) if s.phase not in ENDED]
    return [*times, *wave_steps.next_openings(plan, [n for _, n, _ in _waiting(all_waves)], at)]


def _over(all_waves: Sequence[Wave]) -> Iterator[tuple[int, Over]]:
    return ((i, w) for i, w in enumerate(all_waves) if isinstance(w, Over))


def _late(all_waves: Sequence[Wave]) -> Iterator[tuple[int, str, NodeState]]:
    return ((i, n, w.cohort.nodes[n]) for i, w in _over(all_waves) for n in sorted(w.cohort.late))


def _cohort(all_waves: Sequence[Wave]) -> Iterator[tuple[int, str, NodeState]]:
    return ((i, n, s) for i, n, s in _late(all_waves) if s.stage == "catch_up" and not s.back)


def _waiting(all_waves: Sequence[Wave]) -> list[tuple[int, str, NodeState]]:
    return [(i, n, s) for i, n, s in _late(all_waves) if s.back]
