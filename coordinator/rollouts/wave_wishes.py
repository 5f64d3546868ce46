"""What a person's wish does to the waves of a roll-out. Pure; which wish is allowed when stands in `rollouts`."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime

from fedtide.coordinator.commands import Commands
from fedtide.coordinator.rollouts import waves
from fedtide.coordinator.rollouts.waves import (
    Baking,
    Caching,
    Facts,
    NodeState,
    Offering,
    Over,
    TakenBack,
    Waiting,
    Wave,
)
from fedtide.fabric.errors import InvalidTransition

Waves = tuple[Wave, ...]


def patient(all_waves: Waves, at: datetime) -> Waves:
    """After a pause, deadlines begin anew: meanwhile nothing was offered and nothing decided."""

    def anew(wave: Wave) -> Wave:
        if isinstance(wave, Caching):
            return Caching(at)
        if not isinstance(wave, Offering | Baking | Over):
            return wave
        again = {n: replace(s, offered_at=at) for n, s in wave.cohort.nodes.items() if s.phase not in waves.ENDED}
        wave = waves.with_nodes(wave, again)
        match wave:
            case Baking():
                return replace(wave, since=at)
            case Offering():
                return replace(wave, counted_at=at)
            case _:
                return wave

    return tuple(anew(wave) for wave in all_waves)


def promoted(facts: Facts, all_waves: Waves, group: int, region: str, *, paused: bool) -> Waves:
    """Waves that wait for an approval, a bake, a gate or enough success go on; if paused, whatever stopped them.

    Raises:
        InvalidTransition: none of them waits.
    """
    changed: list[Wave] = []
    for told, wave in zip(facts.plan.waves, all_waves, strict=True):
        meant = region in ("", told.region)
        match wave:
            case Waiting(approved=False) if meant and told.approval and told.group <= group:
                changed.append(replace(wave, approved=True))
            case Baking(waived=False) if meant:
                changed.append(replace(wave, waived=True))
            case Offering(queue=()) if meant and all(s.phase in waves.ENDED for s in waves.members(wave).values()):
                changed.append(Baking(wave.stage, wave.cohort, wave.counted_at, waived=True))
            case Offering(waived=False) if meant and paused:
                changed.append(replace(wave, waived=True))
            case _:
                changed.append(wave)
    if tuple(changed) == all_waves:
        where = f"in {region}" if region else "in any wave"
        raise InvalidTransition(f"roll-out {facts.rollout}: nothing {where} waits for a decision")
    return tuple(changed)


def retried(facts: Facts, all_waves: Waves, at: datetime) -> tuple[Waves, Commands]:
    """Nodes that failed or never took it wait to be offered the release again, under `facts.counter`.

    Raises:
        InvalidTransition: there are none.
    """
    changed, commands = list(all_waves), Commands()
    for index, wave in enumerate(all_waves):
        if isinstance(wave, TakenBack):
            changed[index], more = waves.open_wave(facts, index, at)
            commands += more
            continue
        over = isinstance(wave, Over)
        again = {
            name: NodeState("timed_out", known.stage, facts.counter, at, "to be tried again", back=over)
            for name, known in waves.nodes_of(wave).items()
            if waves.is_failed(known) or (waves.is_absent(known) and not known.back)
        }
        tried = waves.with_nodes(wave, again)
        if again and isinstance(tried, Offering | Baking):
            queue = tried.queue if isinstance(tried, Offering) else ()
            tried = Offering(tried.stage, tried.cohort, (*queue, *again), 1.0, at, tried.waived)
        changed[index] = tried
    if tuple(changed) == all_waves:
        raise InvalidTransition(f"roll-out {facts.rollout}: no node failed or is missing, there is nothing to retry")
    return tuple(changed), commands
