"""Roll-outs as the API shows them: regions, gates, counts of node phases, the reason first. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from fedtide.coordinator.rollouts import gates, planning, rollouts, waves
from fedtide.fabric.messages.views import GateView, PlannedRegion, PlannedRollout, RolloutView, WaveView
from fedtide.fabric.plans.rollout_plan import RolloutPlan


def rollout(state: rollouts.Rollout) -> RolloutView:
    """A roll-out with its waves."""
    facts = state.facts
    return RolloutView(
        rollout=facts.rollout,
        model=facts.plan.model,
        version=facts.plan.version,
        release=facts.plan.release.digest,
        state=rollouts.state_name(state),
        reason=_reason(state),
        started_at=facts.started_at,
        by=facts.by,
        counter=facts.counter,
        wan_bytes=sum(_wan_bytes(w) for w in state.waves),
        catch_up=sum(s.stage == "catch_up" or s.back for s in rollouts.nodes_of(state).values()),
        regions=[_wave(state, index) for index in range(len(facts.plan.waves))],
    )


def _wan_bytes(wave: waves.Wave) -> int:
    return 0 if isinstance(wave, waves.Waiting | waves.Caching) else wave.cohort.wan_bytes


def _reason(state: rollouts.Rollout) -> str:
    match state:
        case rollouts.Paused(reason=reason):
            return reason
        case rollouts.RolledBack(reason=reason, restored=restored, stuck=stuck):
            missing = len(rollouts.holders(state) - restored)
            left = f"; {missing} nodes are not back yet" if missing else ""
            return reason + left + "".join(f"; {n} cannot go back: {why}" for n, why in list(stuck.items())[:3])
        case rollouts.Superseded(by=by):
            return f"superseded by {by}"
        case rollouts.Completed(stopped=stopped):
            return stopped
        case rollouts.Rolling():
            return "; ".join(
                f"{planned.region}: {waits}"
                for planned, wave in zip(state.facts.plan.waves, state.waves, strict=True)
                if (waits := _waits_for(state, planned.region, wave))
            )


def _waits_for(state: rollouts.Rolling, region: str, wave: waves.Wave) -> str:
    """What one wave that is under way waits for, with the numbers."""
    plan = state.facts.plan
    match wave:
        case waves.Waiting(approved=False) if any(
            w.region == region and w.approval and w.group <= state.group for w in plan.waves
        ):
            return "waits for approval: fedtide rollout promote"
        case waves.Caching():
            return "its leaf fetches the release"
        case waves.Offering(stage=stage, queue=queue):
            known = waves.members(wave).values()
            ended = sum(s.phase in waves.ENDED for s in known)
            return f"{stage}, {ended} of {len(known) + len(queue)} done"
        case waves.Baking(stage=stage):
            return f"{stage} is watched: {_bake_waits_for(plan, state, region, wave)}"
        case _:
            return ""


def _bake_waits_for(plan: RolloutPlan, state: rollouts.Rolling, region: str, wave: waves.Baking) -> str:
    index = next(i for i, w in enumerate(plan.waves) if w.region == region)
    judged = [j for j in waves.judge(plan, wave) if j.enforced and j.outcome != "pass"]
    wanted, have = waves.wanted_inferences(plan, index, wave), waves.inferences(wave)
    parts = [f"until {waves.bake_ends(plan, index, wave).isoformat(timespec='seconds')}"]
    parts += [f"{have} of {wanted} inferences"] if have < wanted else []
    parts += [j.reason for j in judged]
    if not judged and plan.approve_after_canary and wave.stage == "canary":
        parts.append("then for approval: fedtide rollout promote")
    return ", ".join(parts)


def _wave(state: rollouts.Rollout, index: int) -> WaveView:
    plan, wave = state.facts.plan, state.waves[index]
    planned = plan.waves[index]
    nodes = waves.nodes_of(wave)
    return WaveView(
        region=planned.region,
        group=planned.group,
        state=waves.state_name(wave),
        nodes=len(planned.canaries) + len(planned.nodes),
        canaries=planned.canaries,
        phases=dict(Counter(s.phase for s in nodes.values())),
        confirmed=sum(s.phase == "confirmed" for s in nodes.values()),
        failed=sum(waves.is_failed(s) for s in nodes.values()),
        absent=sum(waves.is_absent(s) for s in nodes.values()),
        reasons={n: s.reason for n, s in nodes.items() if s.reason},
        gates=[_gate(j) for j in _judged(plan, wave)],
        measured=gates.total(s.measured or gates.NOTHING for s in nodes.values()),
        wan_bytes=_wan_bytes(wave),
        seconds=round(wave.seconds, 3) if isinstance(wave, waves.Over) else None,
    )


def _judged(plan: RolloutPlan, wave: waves.Wave) -> list[gates.Judgement]:
    return waves.judge(plan, wave) if isinstance(wave, waves.Offering | waves.Baking) else []


def _gate(judged: gates.Judgement) -> GateView:
    return GateView(gate=judged.gate, outcome=judged.outcome, reason=judged.reason, enforced=judged.enforced)


def planned(
    plan: RolloutPlan, wan_bytes: Mapping[str, int], release_bytes: int, offline: frozenset[str]
) -> PlannedRollout:
    """A dry run: which nodes, how many bytes over which link, and how long at least.

    Args:
        wan_bytes: what each region's leaf lacks of the release.
        release_bytes: what a node fetches from its leaf, if it has nothing of it.
    """
    regions = [
        PlannedRegion(
            region=wave.region,
            group=wave.group,
            approval=wave.approval,
            canaries=wave.canaries,
            nodes=[*wave.canaries, *wave.nodes],
            offline=[n for n in (*wave.canaries, *wave.nodes) if n in offline],
            wan_bytes=wan_bytes[wave.region],
        )
        for wave in plan.waves
    ]
    return PlannedRollout(
        model=plan.model,
        version=plan.version,
        nodes=sum(len(r.nodes) for r in regions),
        wan_bytes=sum(wan_bytes.values()),
        bytes_per_node=release_bytes,
        at_least_seconds=round(planning.least_seconds(plan, wan_bytes, release_bytes), 1),
        regions=regions,
        gates=plan.gates,
        on_failure=plan.on_failure,
    )


def why(state: rollouts.Rollout, node: str) -> str:
    """What a roll-out did for one node, and why; empty if the node is not part of it."""
    name, plan = state.facts.rollout, state.facts.plan
    known = rollouts.nodes_of(state).get(node)
    wave = next((w for w in plan.waves if node in w.canaries or node in w.nodes), None)
    if known is None and wave is None:
        return ""
    which = f"{name} ({plan.model} v{plan.version}, {rollouts.state_name(state)})"
    if known is None:
        return f"{which}: not offered yet, its wave {wave.region if wave else ''} has not started: {_reason(state)}"
    if isinstance(state, rollouts.RolledBack):
        return f"{which}: goes back to what it served before, because {state.reason}"
    if known.back:
        return f"{which}: was away for its wave, waits in the catch-up cohort ({plan.catch_up_in_flight} at a time)"
    return f"{which}: {known.phase} as {known.stage}" + (f", {known.reason}" if known.reason else "")
