"""`python -m tests.compat.write FOLDER`: the corpus of the coming version. Only before it is released."""

from __future__ import annotations

import json
import sys
from datetime import UTC, datetime
from pathlib import Path

from pydantic import BaseModel

from fedtide.coordinator.log import snapshot_codec
from fedtide.coordinator.state import World
from fedtide.fabric.encoding import to_json
from fedtide.fabric.events.envelope import (
    CoordinatorElected,
    DriftReported,
    Event,
    EventData,
    NodeOffline,
    NodeOnline,
    SignalReceived,
    TriggerApplied,
)
from fedtide.fabric.events.identity import EnrolmentRequest, JoinTokenCreated, NodeEnrolled, NodeRevoked
from fedtide.fabric.events.rollouts import RolloutAbortRequested, RolloutPauseRequested, RolloutResumeRequested
from fedtide.fabric.events.runs import AggregatorStarted, RunCancelRequested, RunCleanedUp, RunCompleted
from fedtide.fabric.messages.fold import FoldAnswer, FoldEntry, FoldFault, FoldPlan, FoldRequest
from fedtide.fabric.messages.heartbeat import Heartbeat
from fedtide.fabric.messages.run_questions import Cohort, CohortQuestion, Member
from fedtide.fabric.messages.tasks import Arrays, Cancel, Packed, Reply, Task, Values, WireMessage
from fedtide.fabric.plans.rollout_plan import Desired, NodePhase, Terms
from fedtide.fabric.plans.round_policy import TimeIsUp
from fedtide.fabric.plans.trigger_rule import Signal, StartRun, TriggerRule
from tests.compat.test_old_and_new_talk import fingerprint
from tests.scenarios import build as b
from tests.scenarios.build import decide

PHASES: tuple[NodePhase, ...] = ("downloading", "verified", "staged", "smoke_tested", "active", "confirmed")
END = datetime(2027, 1, 1, tzinfo=UTC)


class NumberedStory(b.Story):
    """Equal stories give equal events, ids included."""

    number = 0

    def event(self, data: EventData, after_s: float = 1.0) -> Event:
        self.number += 1
        return super().event(data, after_s).model_copy(update={"id": f"evt-{self.number:04d}"})


def story() -> NumberedStory:
    """Something of everything that happens."""
    so_far = NumberedStory()
    rule = TriggerRule(
        name="night", on="com.example.drift", where="psi > 0.2", do=StartRun(app=b.APP, rounds=2), cooldown_s=5
    )
    so_far.tell(b.joined("a", "eu", samples=10), b.joined("b", "eu"), b.joined("c", "us", labels={"zone": "x"}))
    so_far.tell(TriggerApplied(rule=rule))
    so_far.tell(SignalReceived(signal=Signal(id="s#1", type="com.example.drift", fields={"psi": 0.3})))
    so_far.tell(SignalReceived(signal=Signal(id="s#2", type="com.example.drift", fields={"psi": 0.1})))
    so_far.tell(b.requested(), AggregatorStarted(run="run-1", attempt=1), b.opened(1, "a", "b", "c", quorum=2))
    so_far.tell(b.received(1, "a"), b.refused(1, "b"), b.received(1, "c"), b.collected(1, "quorum"))
    so_far.tell(b.closed(1, accuracy=0.5, odd=float("nan")), b.produced(), RunCompleted(run="run-1", attempt=1))
    so_far.tell(RunCleanedUp(run="run-1"), b.published())
    so_far.tell(DriftReported(region="eu", model="m", score=0.3, samples=100))
    gates, terms = [{"kind": "errors", "most": 0.2}], {"measure": True}
    waves = b.wave("eu", "a", "b"), b.wave("us", "", "c")
    so_far.tell(b.rollout(*waves, max_error=0.5, gates=gates, bake={"seconds": 1.0}, terms=terms))
    so_far.tell(*(b.phase("a", phase) for phase in PHASES), b.measured("a", inferences=400, errors=1))
    so_far.tell(RolloutPauseRequested(rollout="ro-1", reason="lunch"), RolloutResumeRequested(rollout="ro-1"))
    so_far.tell(NodeOffline(node="b", reason="no heartbeat for 15 s"), NodeOnline(node="b"))
    so_far.tell(RolloutAbortRequested(rollout="ro-1", reason="enough"), b.phase("a", "confirmed", counter=2))
    so_far.tell(b.requested("run-2"), RunCancelRequested(run="run-2", reason="no"))
    so_far.tell(JoinTokenCreated(token="t1", key="UKEY", uses=2, expires_at=END))
    so_far.tell(NodeEnrolled(node="a", region="eu", key="UK1", expires_at=END, token="t1"))
    so_far.tell(
        NodeRevoked(node="a", reason="stolen"), CoordinatorElected(name="coordinator", url="http://127.0.0.1:1")
    )
    return so_far


def messages() -> list[BaseModel]:
    records = {
        "arrays": Arrays(blob=b.ref("a")),
        "config": Values(kind="config", values={"lr": 0.1, "raw": Packed.of(b"\x00")}),
    }
    asked = WireMessage(
        run_id=1,
        message_id="m",
        src_node_id=1,
        dst_node_id=2,
        created_at=1.0,
        ttl=60.0,
        message_type="train",
        content=records,
    )
    task = Task(task="t", run="run-1", app=b.APP, run_config={"lr": 0.1}, message=asked, expires_at=9.0, codec="int8")
    entry = FoldEntry(task="t", region="eu", node="a", stays=True, blob=b.ref("a"), term=2.0)
    plan = FoldPlan(key="k", run="run-1", specs=[("w", "F32", [2])], points=[(4, 30)], max_terms=3)
    return [
        task,
        Cancel(task="t", run="run-1"),
        Reply(task="t", run="run-1", node="a", seconds=1.5, message=asked),
        Desired(model="m", counter=2, rollout="ro-1", release=b.ref("e"), expires_at=5.0, terms=Terms(measure=True)),
        CohortQuestion(run="run-1", attempt=1, round=1, trial=1, phase="train"),
        Cohort(nodes=[Member(name="a", region="eu", codecs=["int8"])], online=["a"]),
        FoldRequest(plan=plan, entries=[entry], finish="sum"),
        FoldAnswer(instance="i", faults={"t": FoldFault(category="too_far", reason="far")}, weight="3"),
        TimeIsUp(round=1, trial=1, phase="train", cause="deadline"),
        EnrolmentRequest(node="a", region="eu", key="UK"),
        b.published().manifest,
        Heartbeat(rss_bytes=5, busy="run-1-t", stage="training", serving={"m": "e" * 64}),
    ]


def write(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    world = World()
    logged = [decide(world, event)[0] for event in story().events]
    (folder / "events.jsonl").write_bytes(b"".join(to_json(event) + b"\n" for event in logged))
    lines = [json.dumps({"kind": type(m).__name__, "json": to_json(m).decode()}) for m in messages()]
    (folder / "messages.jsonl").write_text("\n".join(lines) + "\n")
    snapshot = snapshot_codec.Snapshot(len(logged), len(logged), world, [e.id for e in logged[-3:]])
    (folder / "snapshot.json").write_bytes(snapshot_codec.encode(snapshot))
    (folder / "states.json").write_text(json.dumps(fingerprint(), indent=1) + "\n")


if __name__ == "__main__":
    write(Path(sys.argv[1]))
