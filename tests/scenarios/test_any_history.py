"""Whatever happens in whatever order: redelivery changes nothing, a restart owes the same, the illegal is refused."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from fedtide.coordinator.log import snapshot_codec as world_codec
from fedtide.coordinator.log.snapshot_codec import Snapshot
from fedtide.coordinator.runs import rounds, runs
from fedtide.coordinator.state import World
from fedtide.coordinator.tracing.spans import Spans
from fedtide.fabric.errors import InvalidTransition
from fedtide.fabric.events.envelope import (
    AlarmRang,
    EventData,
    FiringFailed,
    NodeOffline,
    NodeOnline,
    SignalReceived,
    TriggerApplied,
)
from fedtide.fabric.events.rollouts import (
    RolloutAbortRequested,
    RolloutNextRequested,
    RolloutPauseRequested,
    RolloutPromoteRequested,
    RolloutResumeRequested,
    RolloutRetryRequested,
    RolloutRollbackRequested,
)
from fedtide.fabric.events.runs import (
    AggregatorExited,
    AggregatorStarted,
    RoundAbandoned,
    RunCancelRequested,
    RunCleanedUp,
    RunCompleted,
    RunFailed,
    RunPauseRequested,
    RunResumeRequested,
)
from fedtide.fabric.plans.rollout_plan import Bake, LatencyGate
from fedtide.fabric.plans.round_policy import RoundPolicy
from fedtide.fabric.plans.trigger_rule import Signal, StartRun, TriggerRule
from tests.scenarios.build import (
    APP,
    Story,
    apply,
    cached,
    closed,
    collected,
    joined,
    measured,
    opened,
    phase,
    produced,
    published,
    received,
    refused,
    requested,
    rollout,
    run_alarm,
    wave,
)

RUNS = st.sampled_from(["run-1", "run-2"])
NODES = st.sampled_from(["a", "b", "c"])
ATTEMPTS = st.integers(1, 3)
NUMBERS = st.integers(1, 2)
TRIALS = st.integers(1, 2)
PHASES = st.sampled_from(["train", "evaluate"])
ROLLOUTS = st.sampled_from(["ro-1", "ro-2"])
WISHES = [
    RolloutAbortRequested,
    RolloutNextRequested,
    RolloutPauseRequested,
    RolloutPromoteRequested,
    RolloutResumeRequested,
    RolloutRollbackRequested,
]
NODE_PHASES = st.sampled_from(["downloading", "confirmed", "failed", "rolled_back"])


def _at(run: str, attempt: int, trial: int) -> dict[str, Any]:
    return {"run": run, "attempt": attempt, "trial": trial}


class AnyHistory(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.story = Story()
        self.spans = Spans()

    def tell(self, data: EventData, *, comes_again: bool = True) -> None:
        """Apply an event; an illegal one must change nothing and name what it is about."""
        before = _tables(self.story.world.copy())
        event = self.story.event(data)
        refusal = ""
        try:
            apply(self.story.world, event)
        except InvalidTransition as exc:
            refusal = str(exc)
        if refusal:
            names = [str(getattr(data, n)) for n in ("run", "rollout", "node", "id") if hasattr(data, n)]
            assert any(name in refusal for name in names), refusal
            assert _tables(self.story.world.copy()) == before
            return
        self.story.events.append(event)
        for span in self.spans.of(event, self.story.world):
            assert span.began <= span.ended, span
            assert span.parent is None or span.parent.trace == span.context.trace, span
        if comes_again:
            self._again(event)

    def _again(self, event: Any) -> None:
        """What is counted is the engine's matter: it applies each id once."""
        counted = {name: getattr(self.story.world, name) for name in ("hour", "valuer", "metered")}
        tables = {name: dict(getattr(self.story.world, name)) for name in ("ledger", "budgets", "hourly")}
        after = _tables(self.story.world.copy())
        with suppress(InvalidTransition):  # a second request under one id
            apply(self.story.world, event)
        for name, before in (counted | tables).items():
            setattr(self.story.world, name, before)
        assert _tables(self.story.world.copy()) == after

    @rule(run=RUNS, grace_s=st.sampled_from([0.0, 5.0]))
    def request(self, run: str, grace_s: float) -> None:
        self.tell(requested(run, policy=RoundPolicy(quorum=2, grace_s=grace_s)))

    @rule(run=RUNS, attempt=ATTEMPTS, number=NUMBERS, trial=TRIALS, kind=PHASES, nodes=st.sets(NODES, min_size=1))
    def open_round(self, run: str, attempt: int, number: int, trial: int, kind: str, nodes: set[str]) -> None:
        self.tell(opened(number, *sorted(nodes), run=run, attempt=attempt, trial=trial, phase=kind, quorum=2))

    @rule(run=RUNS, attempt=ATTEMPTS, number=NUMBERS, trial=TRIALS, kind=PHASES, node=NODES)
    def receive(self, run: str, attempt: int, number: int, trial: int, kind: str, node: str) -> None:
        self.tell(received(number, node, phase=kind, **_at(run, attempt, trial)))

    @rule(run=RUNS, attempt=ATTEMPTS, number=NUMBERS, trial=TRIALS, node=NODES, late=st.booleans())
    def refuse(self, run: str, attempt: int, number: int, trial: int, node: str, late: bool) -> None:
        self.tell(refused(number, node, "late" if late else "timeout", **_at(run, attempt, trial)))

    @rule(run=RUNS, attempt=ATTEMPTS, number=NUMBERS, trial=TRIALS)
    def end_collecting(self, run: str, attempt: int, number: int, trial: int) -> None:
        self.tell(collected(number, **_at(run, attempt, trial)))

    @rule(run=RUNS, attempt=ATTEMPTS, number=NUMBERS, trial=TRIALS, well=st.booleans())
    def end_round(self, run: str, attempt: int, number: int, trial: int, well: bool) -> None:
        if well:
            self.tell(closed(number, attempt).model_copy(update={"run": run}))
        else:
            self.tell(RoundAbandoned(round=number, reason="too few", **_at(run, attempt, trial)))

    @rule(run=RUNS, attempt=ATTEMPTS, how=st.sampled_from(["started", "exited", "completed", "failed"]))
    def aggregator(self, run: str, attempt: int, how: str) -> None:
        match how:
            case "started":
                self.tell(AggregatorStarted(run=run, attempt=attempt))
            case "exited":
                self.tell(AggregatorExited(run=run, attempt=attempt, code=1))
            case "completed":
                self.tell(RunCompleted(run=run, attempt=attempt))
            case _:
                self.tell(RunFailed(run=run, attempt=attempt, reason="because"))

    @rule(run=RUNS, what=st.sampled_from([RunPauseRequested, RunResumeRequested, RunCancelRequested, RunCleanedUp]))
    def a_person(self, run: str, what: type[Any]) -> None:
        self.tell(what(run=run))

    @rule(run=RUNS, pick=st.integers(0, 3))
    def ring(self, run: str, pick: int) -> None:
        owed = [c for c in self.story.pending_commands() if getattr(c, "owner", "") and c.id in (run, "ro-1")]
        if owed:
            chosen = owed[pick % len(owed)]
            rang = AlarmRang(owner="rollout", id=chosen.id, key=chosen.key)
            self.tell(rang if chosen.owner == "rollout" else run_alarm(chosen.key, chosen.id))

    @rule(node=NODES, what=st.sampled_from(["joined", "online", "offline"]))
    def fleet(self, node: str, what: str) -> None:
        match what:
            case "joined":
                self.tell(joined(node))
            case "online":
                self.tell(NodeOnline(node=node))
            case _:
                self.tell(NodeOffline(node=node, reason="stopped"))

    @rule(policy=st.sampled_from(["skip", "queue", "replace"]))
    def apply_rule(self, policy: Any) -> None:
        self.tell(TriggerApplied(rule=TriggerRule(name="r", on="drift", do=StartRun(app=APP), policy=policy)))

    @rule(key=st.sampled_from("123"))
    def signal(self, key: str) -> None:
        # Told twice it is judged twice, as a duplicate: the history says so.
        self.tell(SignalReceived(signal=Signal(id=key, type="drift")), comes_again=False)

    @rule(start=st.booleans())
    def answer_firing(self, start: bool) -> None:
        for trigger in self.story.world.triggers.values():
            for firing in trigger.asked[:1]:
                if start:
                    self.tell(requested(firing.started))
                else:
                    self.tell(FiringFailed(rule="r", id=firing.started, reason="no app"), comes_again=False)

    @rule()
    def release(self) -> None:
        self.tell(produced())
        self.tell(published())

    @rule(key=ROLLOUTS, on_failure=st.sampled_from(["pause", "rollback_wave", "rollback_all"]))
    def roll_out(self, key: str, on_failure: str) -> None:
        counter = self.story.world.models["m"].counter + 1 if "m" in self.story.world.models else 1
        plan: dict[str, Any] = {"on_failure": on_failure, "gates": [LatencyGate()], "bake": Bake(seconds=3)}
        self.tell(rollout(wave("eu", "a", "b"), wave("us", "", "c"), key=key, counter=counter, **plan))

    @rule(key=ROLLOUTS, node=NODES, name=NODE_PHASES, counter=st.integers(1, 4))
    def node_phase(self, key: str, node: str, name: Any, counter: int) -> None:
        self.tell(phase(node, name, counter=counter, key=key))

    @rule(key=ROLLOUTS, region=st.sampled_from(["eu", "us"]))
    def cache(self, key: str, region: str) -> None:
        self.tell(cached(region, key))

    @rule(key=ROLLOUTS, node=NODES, counter=st.integers(1, 4), good=st.booleans())
    def measure(self, key: str, node: str, counter: int, good: bool) -> None:
        self.tell(measured(node, counter, key, shadowed=100, slower=0 if good else 90))

    @rule(key=ROLLOUTS, what=st.sampled_from(WISHES))
    def wish(self, key: str, what: type[Any]) -> None:
        # A person who asks twice means it: "next" begins the one after.
        self.tell(what(rollout=key), comes_again=False)

    @rule(key=ROLLOUTS)
    def retry(self, key: str) -> None:
        if "m" in self.story.world.models:
            counter = self.story.world.models["m"].counter + 1
            self.tell(RolloutRetryRequested(rollout=key, counter=counter), comes_again=False)

    @invariant()
    def a_restart_gives_the_same_state_and_owes_exactly_the_same(self) -> None:
        world = self.story.world
        read_back = world_codec.decode(world_codec.encode(Snapshot(0, 0, world, []))).world
        for other in (self.story.replayed(), read_back):
            assert _tables(other) == _tables(world)
            assert list(other.pending_commands()) == list(world.pending_commands())

    @invariant()
    def a_node_is_counted_once(self) -> None:
        for run in self.story.world.runs.values():
            for each in run.rounds.values():
                for tally in each.phases.values():
                    assert not tally.received & tally.refused.keys()

    @invariant()
    def what_has_ended_wants_nothing_but_to_be_cleaned_up(self) -> None:
        for run in self.story.world.runs.values():
            if isinstance(run, runs.Ended):
                assert len(runs.pending_commands(run)) <= 1
                assert all(isinstance(r, rounds.Closed | rounds.Abandoned) for r in run.rounds.values())


def _tables(world: World) -> dict[str, Any]:
    return {name: table for name, table in vars(world).items() if not name.startswith("_")}


AnyHistory.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
test_any_history = AnyHistory.TestCase
