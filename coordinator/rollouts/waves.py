"""One wave of a roll-out: a region's nodes, its canaries first. Pure.

`TRANSITIONS` defines which state may follow which. A report is recorded in the state of its node; `advance` then
decides what follows, checking in this order: error threshold and failed gates, inconclusive results, success. Rates
are taken over the nodes that attempted the release (reached a final phase, or took the release and got stuck). A node
that did not take its offer by the claim deadline moves from the wave to the catch-up cohort. That all nodes have ended
is never enough to promote a wave. Times come from the events.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Literal, TypeVar

from fedtide.coordinator.commands import CacheRelease, Command, Commands, SetDesired
from fedtide.coordinator.decisions import Decisions
from fedtide.coordinator.rollouts import gates
from fedtide.coordinator.rollouts.gates import Answers, Judgement
from fedtide.coordinator.transitions import Transition, check_transition
from fedtide.fabric.errors import InvalidTransition
from fedtide.fabric.events.rollouts import NodeMeasured, NodePhaseReported, QueryAnswered, RegionCached
from fedtide.fabric.messages.views import WaveState
from fedtide.fabric.plans.rollout_plan import Measured, NodePhase, QueryGate, RolloutPlan, Terms
from fedtide.fabric.plans.windows import is_open, opening, opens_at
from fedtide.fabric.tensors.blobs import BlobRef
from fedtide.fabric.times import later
from fedtide.fabric.trace_context import Origin

FAILED: frozenset[NodePhase] = frozenset({"failed", "rolled_back", "rejected"})
ENDED: frozenset[NodePhase] = FAILED | {"confirmed", "timed_out", "superseded"}

Stage = Literal["canary", "rest", "catch_up"]


@dataclass(frozen=True, slots=True)
class RolloutFacts:
    """`counter` is the highest under which the release was offered; the next one is reserved for the rollback."""

    rollout: str
    plan: RolloutPlan
    counter: int
    by: str
    started_at: datetime
    trace: str = ""

    @property
    def origin(self) -> Origin:
        return Origin(self.rollout, self.by, self.trace)


@dataclass(frozen=True, slots=True)
class NodeState:
    """The last phase that counts.

    `claimed`: the node has reported on this offer. `back`: it missed its wave and is online now. `away`: it went
    offline after it confirmed. `since`: when it confirmed. `settled`: it is no longer watched (catch-up only).
    """

    phase: NodePhase
    stage: Stage
    counter: int
    offered_at: datetime
    reason: str = ""
    claimed: bool = False
    back: bool = False
    away: bool = False
    since: datetime | None = None
    settled: bool = False
    measured: Measured | None = None


@dataclass(frozen=True, slots=True)
class Cohort:
    """Every node of the wave that was offered the release so far, or came later.

    `late`: the nodes in the catch-up cohort or waiting for it; an index, because they are few among many.
    """

    opened_at: datetime
    wan_bytes: int = 0
    nodes: Mapping[str, NodeState] = field(default_factory=dict)
    late: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Waiting:
    """Waits for its turn, or for the approval of a person."""

    approved: bool = False


@dataclass(frozen=True, slots=True)
class Caching:
    since: datetime


@dataclass(frozen=True, slots=True)
class Offering:
    """`queue`: not offered yet, in order. `allowance`: offers that the rate admits, as of `counted_at`.

    `waived`: a person decided that this wave continues whatever the result of its gates.
    """

    stage: Stage
    cohort: Cohort
    queue: tuple[str, ...]
    allowance: float
    counted_at: datetime
    waived: bool = False


@dataclass(frozen=True, slots=True)
class Baking:
    """Every node of the stage has ended, and enough confirmed. `waived`: as in `Offering`.

    `answers`: to the questions of query gates, by the gate's number.
    """

    stage: Stage
    cohort: Cohort
    since: datetime
    waived: bool = False
    answers: Mapping[str, Answers] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Over:
    cohort: Cohort
    seconds: float


@dataclass(frozen=True, slots=True)
class TakenBack:
    """`restored` nodes confirmed that they serve what they served before."""

    cohort: Cohort
    reason: str
    restored: frozenset[str] = frozenset()


Wave = Waiting | Caching | Offering | Baking | Over | TakenBack

TRANSITIONS: tuple[Transition, ...] = (
    Transition(Waiting, "its turn", Caching),
    Transition(Caching, "the region has the release", Offering),
    Transition(Offering, "every node of the stage has ended, enough confirmed", Baking),
    Transition(Baking, "canaries are good", Offering),
    Transition(Baking, "the last stage is good", Over),
    Transition(Offering, "a failure, with rollback_wave", TakenBack),
    Transition(Baking, "a failure, with rollback_wave", TakenBack),
    Transition(Baking, "retry", Offering),
    Transition(TakenBack, "retry", Caching),
)
"""Every change of state; each roll-out's step is checked against it."""

Staged = Offering | Baking

BACK = Terms(new_interface=True)
"""The terms of a rollback: at once, and even if the earlier release has another interface."""

Report = NodePhaseReported | NodeMeasured | RegionCached | QueryAnswered
W = TypeVar("W", bound=Wave)
Waves = tuple[Wave, ...]


@dataclass(frozen=True, slots=True)
class WaveProblem:
    """`failed`: the plan's action follows. Otherwise a person has to look."""

    reason: str
    failed: bool


def open_wave(facts: RolloutFacts, index: int, at: datetime) -> tuple[Wave, Commands]:
    return Caching(at), (_cache(facts, index),)


def cached(facts: RolloutFacts, index: int, wave: Caching, wan_bytes: int, at: datetime) -> Offering:
    """The region has the release: its canaries may be offered it."""
    plan = facts.plan.waves[index]
    stage: Stage = "canary" if plan.canaries else "rest"
    return Offering(stage, Cohort(wave.since, wan_bytes), tuple(plan.canaries or plan.nodes), 1.0, at)


def state_name(wave: Wave) -> WaveState:
    """The state as views name it."""
    match wave:
        case Waiting():
            return "waiting"
        case Caching():
            return "caching"
        case Offering():
            return "offering"
        case Baking():
            return "baking"
        case Over():
            return "over"
        case TakenBack():
            return "takenback"


def nodes_of(wave: Wave) -> Mapping[str, NodeState]:
    return {} if isinstance(wave, Waiting | Caching) else wave.cohort.nodes


def with_nodes(wave: W, changed: Mapping[str, NodeState], wan_bytes: int = 0) -> W:
    """The wave with some of its nodes in another state."""
    if isinstance(wave, Waiting | Caching) or not changed:
        return wave
    known = wave.cohort
    late = {name for name, state in changed.items() if state.back or state.stage == "catch_up"}
    cohort = Cohort(
        known.opened_at,
        known.wan_bytes + wan_bytes,
        {**known.nodes, **changed},
        known.late | late if late else known.late,
    )
    return replace(wave, cohort=cohort)


def note(wave: Wave, event: NodePhaseReported, at: datetime) -> Wave:
    """The wave after a node's report. The first final phase counts; a report under another counter is ignored."""
    known = nodes_of(wave).get(event.node)
    if known is None or known.counter != event.counter:
        return wave
    if known.phase in ENDED and known.phase != "timed_out":
        return wave
    if event.phase == "timed_out":
        # The node is online, but its offer had expired when it came back: it gets one more offer.
        if known.claimed or known.stage == "catch_up":
            return wave
        return with_nodes(wave, {event.node: replace(known, phase="timed_out", reason=event.reason, back=True)})
    late = isinstance(wave, Over) and known.phase == "timed_out"
    after = replace(
        known,
        phase=event.phase,
        stage="catch_up" if late else known.stage,
        reason=event.reason,
        claimed=True,
        back=False,
        since=at if event.phase == "confirmed" else None,
    )
    return with_nodes(wave, {event.node: after}, event.wan_bytes)


def measure(wave: Wave, node: str, counter: int, measured: Measured) -> Wave:
    known = nodes_of(wave).get(node)
    if known is None or known.counter != counter or known.phase in FAILED:
        return wave
    return with_nodes(wave, {node: replace(known, measured=measured)})


def answered(plan: RolloutPlan, wave: Baking, event: QueryAnswered, at: datetime) -> Baking:
    gate = plan.gates[event.gate] if event.gate < len(plan.gates) else None
    if not isinstance(gate, QueryGate):
        return wave
    key = str(event.gate)
    after = gates.after_answer(gate, wave.answers.get(key, gates.UNASKED), event.value, event.reason, at)
    return replace(wave, answers={**wave.answers, key: after})


def reported(facts: RolloutFacts, all_waves: tuple[Wave, ...], event: Report, at: datetime) -> tuple[Wave, ...]:
    """The waves after a report; the same object if it says nothing new."""
    changed = list(all_waves)
    for index, wave in enumerate(all_waves):
        match event, wave:
            case RegionCached(region=region), Caching() if region == facts.plan.waves[index].region:
                changed[index] = cached(facts, index, wave, event.wan_bytes, at)
            case QueryAnswered(region=region), Baking() if region == facts.plan.waves[index].region:
                if (event.stage, event.since) == (wave.stage, wave.since):
                    changed[index] = answered(facts.plan, wave, event, at)
            case NodeMeasured(node=node), _:
                changed[index] = measure(wave, node, event.counter, event.measured)
            case NodePhaseReported(phase="confirmed", node=node), TakenBack(restored=restored, cohort=cohort):
                if node in cohort.nodes and event.counter > facts.counter:
                    changed[index] = replace(wave, restored=restored | {node})
            case NodePhaseReported(), _:
                changed[index] = note(wave, event, at)
            case _:
                pass
    return all_waves if all(a is b for a, b in zip(changed, all_waves, strict=True)) else _legal(all_waves, changed)


def _legal(before: Waves, after: Iterable[Wave]) -> Waves:
    changed = tuple(after)
    for was, now in zip(before, changed, strict=True):
        check_transition(TRANSITIONS, was, now)
    return changed


def members(wave: Staged) -> dict[str, NodeState]:
    """The nodes whose outcome decides the present stage; the canaries still count in the stage `rest`."""
    stages = ("canary",) if wave.stage == "canary" else ("canary", "rest")
    return {name: state for name, state in wave.cohort.nodes.items() if state.stage in stages}


def is_failed(state: NodeState) -> bool:
    return state.phase in FAILED or (state.phase == "timed_out" and state.claimed)


def is_absent(state: NodeState) -> bool:
    """It never took its offer."""
    return state.phase == "timed_out" and not state.claimed


def offer(facts: RolloutFacts, node: str, state: NodeState) -> SetDesired:
    plan = facts.plan
    until = later(state.offered_at, plan.claim_deadline_s)
    return SetDesired(node, plan.model, state.counter, facts.rollout, plan.release, until, plan.terms)


def settle(facts: RolloutFacts, node: str, state: NodeState) -> SetDesired:
    """The desired state that a node keeps: the release without a deadline and without measurements."""
    plan = facts.plan
    return SetDesired(node, plan.model, state.counter, facts.rollout, plan.release, None, settled_terms(plan))


def is_settled(state: NodeState) -> bool:
    """Whether a node of a wave that is over keeps the release and is no longer watched."""
    return state.phase == "confirmed" and (state.settled or state.stage != "catch_up")


def settled_terms(plan: RolloutPlan) -> Terms:
    return plan.terms.model_copy(update={"measure": False, "holdout": 0, "shadow": 0.0})


def _cache(facts: RolloutFacts, index: int) -> CacheRelease:
    plan = facts.plan
    return CacheRelease(facts.rollout, plan.waves[index].region, facts.counter, plan.release, plan.region_bytes_per_s)


def take_back(facts: RolloutFacts, nodes: Iterable[str]) -> tuple[SetDesired, ...]:
    """Each node serves what it served before, under a higher counter."""
    plan = facts.plan
    return tuple(
        SetDesired(n, plan.model, facts.counter + 1, facts.rollout, release_before(plan, n), None, BACK)
        for n in sorted(nodes)
    )


def release_before(plan: RolloutPlan, node: str) -> BlobRef | None:
    """What a node goes back to. A node that joined later goes back to what most nodes served."""
    planned = any(node in w.canaries or node in w.nodes for w in plan.waves)
    return plan.previous.get(node) if planned else plan.fallback


def pending_commands(facts: RolloutFacts, index: int, wave: Wave) -> Commands:
    """What the wave still wants done: issued on entry, and again after a restart."""
    match wave:
        case Caching():
            return (_cache(facts, index),)
        case TakenBack(cohort=cohort, restored=restored):
            return take_back(facts, cohort.nodes.keys() - restored)
        case Offering() | Baking() | Over():
            nodes = wave.cohort.nodes
            offers: list[Command] = [offer(facts, n, s) for n, s in nodes.items() if s.phase not in ENDED]
            if isinstance(wave, Over):
                offers += [settle(facts, n, s) for n, s in nodes.items() if is_settled(s)]
            return tuple(offers)
        case _:
            return ()


def pending_offers(facts: RolloutFacts, all_waves: Waves) -> tuple[SetDesired, ...]:
    """Offers under way to nodes of waves that are over."""
    nodes = [(n, s) for wave in all_waves if isinstance(wave, Over) for n, s in wave.cohort.nodes.items()]
    return tuple(offer(facts, n, s) for n, s in nodes if s.phase not in ENDED)


Progress = tuple[Wave, Commands, WaveProblem | None]


def too_many_errors(plan: RolloutPlan, states: Iterable[NodeState]) -> str:
    """Why the error threshold is exceeded; empty if it is not."""
    known = list(states)
    failed = [s for s in known if is_failed(s)]
    attempted = len(failed) + sum(s.phase == "confirmed" for s in known)
    if attempted < plan.min_attempted or not failed or len(failed) / attempted <= plan.max_error:
        return ""
    share = f"{len(failed)} of {attempted} attempted nodes failed, allowed are {plan.max_error:.0%}"
    return f"{share}; first reason: {failed[0].reason or failed[0].phase}"


def judge(plan: RolloutPlan, wave: Staged) -> list[Judgement]:
    """Every gate of the plan over the nodes of the stage that serve the release, as this version judges it."""
    if not plan.gates:
        return []
    serving = {n: s.measured or gates.NOTHING for n, s in members(wave).items() if s.phase == "confirmed"}
    answers = wave.answers if isinstance(wave, Baking) else {}
    return [
        gates.judge(gate, serving, plan.slices, answers.get(str(number), gates.UNASKED))
        for number, gate in enumerate(plan.gates)
    ]


def decide(decisions: Decisions, facts: RolloutFacts, index: int, wave: Staged) -> list[Judgement]:
    """The verdict of every gate: on a replay as it was logged, otherwise as this version judges it now."""
    plan = facts.plan
    if not plan.gates:
        return []
    key = f"gates/{facts.rollout}/{plan.waves[index].region}/{wave.stage}"
    verdicts = decisions.replay_or_decide(key, lambda: [[j.outcome, j.reason] for j in judge(plan, wave)])
    return [Judgement(g.kind, o, r, g.enforce) for g, (o, r) in zip(plan.gates, verdicts, strict=False)]


def advance(facts: RolloutFacts, index: int, wave: Wave, at: datetime, decisions: Decisions) -> Progress:
    """What follows from the wave as it is at `at`."""
    plan, where = facts.plan, facts.plan.waves[index].region
    if isinstance(wave, Caching) and at >= later(wave.since, plan.cache_deadline_s):
        reason = f"{where}: its leaf has not got the release within {plan.cache_deadline_s:g} s; is it connected?"
        return wave, (), WaveProblem(reason, failed=False)
    if not isinstance(wave, Offering | Baking):
        return wave, (), None
    wave = with_nodes(wave, expired(plan, wave.cohort.nodes, at))
    judged = decide(decisions, facts, index, wave)
    if (failure := what_failed(plan, index, wave, judged)) is not None:
        return wave, (), failure
    if isinstance(wave, Offering):
        return _offer(facts, f"{where}, {wave.stage}", wave, at)
    return _bake(facts, index, wave, judged, at)


def what_failed(plan: RolloutPlan, index: int, wave: Staged, judged: list[Judgement]) -> WaveProblem | None:
    """The problem that calls for the plan's `on_failure` action: too many errors, or a failed gate."""
    here = f"{plan.waves[index].region}, {wave.stage}"
    if reason := too_many_errors(plan, members(wave).values()):
        return WaveProblem(f"{here}: {reason}", failed=True)
    bad = next((j for j in judged if j.outcome == "fail" and j.enforced), None)
    return None if bad is None or wave.waived else WaveProblem(f"{here}: {bad.reason}", failed=True)


def _offer(facts: RolloutFacts, here: str, wave: Offering, at: datetime) -> Progress:
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
        return wave, (), WaveProblem(reason, failed=False)
    if confirmed / attempted < plan.min_success:
        reason = f"{here}: {confirmed} of {attempted} confirmed, required are {plan.min_success:.0%}"
        return wave, (), WaveProblem(reason, failed=False)
    return Baking(wave.stage, wave.cohort, at, wave.waived), (), None


def _bake(facts: RolloutFacts, index: int, wave: Baking, judged: list[Judgement], at: datetime) -> Progress:
    plan = facts.plan
    here = f"{plan.waves[index].region}, {wave.stage}"
    over = at >= bake_ends(plan, index, wave)
    if not wave.waived:
        enforced = [j for j in judged if j.enforced]
        if not over or inferences(wave) < wanted_inferences(plan, index, wave):
            return wave, (), _late(plan, index, wave, at, f"{inferences(wave)} inferences so far")
        gone = sorted(n for n, s in members(wave).items() if s.away)
        if gone and wave.stage == "canary":
            return wave, (), _late(plan, index, wave, at, f"{gone[0]} has been offline since it confirmed")
        broken = next((j for j in enforced if j.outcome == "error"), None)
        if broken is not None:
            return wave, (), WaveProblem(f"{here}: cannot be judged, {broken.reason}", failed=False)
        open_ = next((j for j in enforced if j.outcome != "pass"), None)
        if open_ is not None:
            if plan.on_inconclusive == "pause" and open_.gate != "query":  # its next answer decides
                return wave, (), WaveProblem(f"{here}: {open_.reason}", failed=False)
            return wave, (), _late(plan, index, wave, at, open_.reason)
        if (stale := _stale(plan, wave, at)) is not None:
            return wave, (), _late(plan, index, wave, at, stale)
        if wave.stage == "canary" and plan.approve_after_canary:
            return wave, (), None
    return _next_stage(facts, index, wave, at)


def _stale(plan: RolloutPlan, wave: Baking, at: datetime) -> str | None:
    """Why what a query gate was answered says nothing of now: whoever asks was away."""
    for number, gate in enumerate(plan.gates):
        told = wave.answers.get(str(number), gates.UNASKED).at if isinstance(gate, QueryGate) and gate.enforce else None
        if isinstance(gate, QueryGate) and told is not None and at > later(told, 2 * max(gate.every_s, 60.0) + 60.0):
            return f"query: its last answer is {(at - told).total_seconds():.0f} s old"
    return None


def _late(plan: RolloutPlan, index: int, wave: Baking, at: datetime, reason: str) -> WaveProblem | None:
    limit = later(bake_ends(plan, index, wave), plan.gate_deadline_s)
    if at < limit:
        return None
    here = f"{plan.waves[index].region}, {wave.stage}"
    return WaveProblem(f"{here}: still undecided after {plan.gate_deadline_s:g} s: {reason}", failed=False)


def _next_stage(facts: RolloutFacts, index: int, wave: Baking, at: datetime) -> Progress:
    rest = facts.plan.waves[index].nodes
    if wave.stage == "canary" and rest:
        return Offering("rest", wave.cohort, tuple(rest), 1.0, at, wave.waived), (), None
    settled = tuple(settle(facts, n, s) for n, s in wave.cohort.nodes.items() if s.phase == "confirmed")
    # A node that came back and took its old offer during the bake continues in the catch-up cohort.
    on_the_way = {n: replace(s, stage="catch_up") for n, s in wave.cohort.nodes.items() if s.phase not in ENDED}
    seconds = (at - wave.cohort.opened_at).total_seconds()
    return Over(with_nodes(wave, on_the_way).cohort, seconds), settled, None


def _is_watched(plan: RolloutPlan, index: int, wave: Baking) -> bool:
    """The bake applies to the canary stage; in a wave without canaries, to its only stage."""
    return wave.stage == "canary" or not plan.waves[index].canaries


def bake_ends(plan: RolloutPlan, index: int, wave: Baking) -> datetime:
    return later(wave.since, plan.bake.seconds if _is_watched(plan, index, wave) else 0.0)


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
    try:
        grown = plan.rate.per_minute * plan.rate.growth ** min(confirmed, 100)
    except OverflowError:
        return plan.rate.most_per_minute
    return min(grown, plan.rate.most_per_minute)


def expired(plan: RolloutPlan, nodes: Mapping[str, NodeState], at: datetime) -> dict[str, NodeState]:
    """The nodes whose deadline has passed, in their new state."""
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
    return later(start, seconds)


def may_activate(plan: RolloutPlan, name: str, at: datetime) -> bool:
    window = plan.terms.window
    return window is None or is_open(window, at, plan.timezones.get(name, "UTC"))


def due(facts: RolloutFacts, index: int, wave: Wave, at: datetime) -> datetime | None:
    """When the wave has to be looked at again even if no report arrives."""
    plan = facts.plan
    times: list[datetime] = []
    match wave:
        case Caching(since=since):
            times.append(later(since, plan.cache_deadline_s))
        case Offering():
            if wave.queue and plan.rate.per_minute is not None and wave.allowance < 1:
                times.append(later(wave.counted_at, 60 * (1 - wave.allowance) / rate_now(plan, wave)))
            times += next_openings(plan, wave.queue, at)
        case Baking():
            ends = bake_ends(plan, index, wave)
            times.append(ends if at < ends else later(ends, plan.gate_deadline_s))
        case _:
            pass
    if isinstance(wave, Offering | Baking):
        times += [deadline(plan, n, s, at) for n, s in wave.cohort.nodes.items() if s.phase not in ENDED]
    # A time that has passed was handled just now; the wave then waits for a report or a person.
    return min((time for time in times if time > at), default=None)


def next_openings(plan: RolloutPlan, names: Iterable[str], at: datetime) -> list[datetime]:
    window = plan.terms.window
    if window is None:
        return []
    zones = {plan.timezones.get(n, "UTC") for n in names if not may_activate(plan, n, at)}
    return [opens_at(window, at, each) for each in zones]


def with_restarted_deadlines(all_waves: Waves, at: datetime) -> Waves:
    """Restart all deadlines after a pause, during which nothing was offered or decided."""

    def anew(wave: Wave) -> Wave:
        if isinstance(wave, Caching):
            return Caching(at)
        if not isinstance(wave, Offering | Baking | Over):
            return wave
        again = {n: replace(s, offered_at=at) for n, s in wave.cohort.nodes.items() if s.phase not in ENDED}
        wave = with_nodes(wave, again)
        match wave:
            case Baking():
                return replace(wave, since=at, answers={})
            case Offering():
                return replace(wave, counted_at=at)
            case _:
                return wave

    return tuple(anew(wave) for wave in all_waves)


def promoted(facts: RolloutFacts, all_waves: Waves, group: int, region: str, *, paused: bool) -> Waves:
    """Let waves continue that wait for approval, bake, gates or enough success.

    If `paused`, a wave that is still offering also continues, whatever the result of its gates.

    Raises:
        InvalidTransition: no wave waits.
    """
    changed: list[Wave] = []
    for planned, wave in zip(facts.plan.waves, all_waves, strict=True):
        meant = region in ("", planned.region)
        match wave:
            case Waiting(approved=False) if meant and planned.approval and planned.group <= group:
                changed.append(replace(wave, approved=True))
            case Baking(waived=False) if meant:
                changed.append(replace(wave, waived=True))
            case Offering(queue=()) if meant and all(s.phase in ENDED for s in members(wave).values()):
                changed.append(Baking(wave.stage, wave.cohort, wave.counted_at, waived=True))
            case Offering(waived=False) if meant and paused:
                changed.append(replace(wave, waived=True))
            case _:
                changed.append(wave)
    if tuple(changed) == all_waves:
        where = f"in {region}" if region else "in any wave"
        raise InvalidTransition(f"roll-out {facts.rollout}: nothing {where} waits for a decision")
    return _legal(all_waves, changed)


def retried(facts: RolloutFacts, all_waves: Waves, at: datetime) -> tuple[Waves, Commands]:
    """Queue the nodes that failed or never took the release: they are offered it again, under `facts.counter`.

    Raises:
        InvalidTransition: there are no such nodes.
    """
    changed, commands = list(all_waves), Commands()
    for index, wave in enumerate(all_waves):
        if isinstance(wave, TakenBack):
            changed[index], more = open_wave(facts, index, at)
            commands += more
            continue
        over = isinstance(wave, Over)
        again = {
            name: NodeState("timed_out", known.stage, facts.counter, at, "to be tried again", back=over)
            for name, known in nodes_of(wave).items()
            if is_failed(known) or (is_absent(known) and not known.back)
        }
        tried = with_nodes(wave, again)
        if again and isinstance(tried, Offering | Baking):
            queue = tried.queue if isinstance(tried, Offering) else ()
            tried = Offering(tried.stage, tried.cohort, (*queue, *again), 1.0, at, tried.waived)
        changed[index] = tried
    if tuple(changed) == all_waves:
        raise InvalidTransition(f"roll-out {facts.rollout}: no node failed or is missing, there is nothing to retry")
    return _legal(all_waves, changed), commands
