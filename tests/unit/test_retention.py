"""What of the stored bytes the state still needs."""

from __future__ import annotations

import os
from datetime import datetime, timedelta
from pathlib import Path

from fedtide.coordinator.runs import runs
from fedtide.coordinator.storage import run_folders
from fedtide.coordinator.storage.retention import SPARED, garbage, largest_holders, needed
from fedtide.fabric.events.envelope import TriggerApplied
from fedtide.fabric.events.identity import JoinTokenCreated, NodeEnrolled, NodeRevoked
from fedtide.fabric.events.runs import RunCancelRequested, RunCleanedUp, RunCompleted, RunRemoved
from fedtide.fabric.nats.subjects import Subjects
from fedtide.fabric.plans.trigger_rule import TriggerRule
from tests.scenarios.build import APP, START, Story, joined, produced, published, ref, requested

S = Subjects()
BUNDLE = f"{S.blob(APP.bundle.digest)}.0"


def gone(story: Story, *subjects: str, members_only: bool = False, at: datetime = START) -> list[str]:
    return [g.pattern for g in garbage(dict.fromkeys(subjects, 1), needed(story.world, at, members_only=members_only))]


def test_what_an_active_run_has_stored_stays_for_as_long_as_it_is_active() -> None:
    story, other = Story(), "run-2"
    story.tell(joined("n1"), requested())
    of_run = (
        f"{S.round_blob('run-1', 'd' * 64)}.0",
        S.checkpoint("run-1", "head"),
        S.reply("eu", "n1", "run-1", "t"),
        f"{S.update_blob('eu', 'n1', 'run-1', 'd' * 64)}.0",
        f"{S.stay_blob('eu', 'n1', 'run-1', 'd' * 64)}.m",
        f"{S.update_blob('eu', 'fold', 'run-1', 'd' * 64)}.m",
        f"{S.update_blob('hub', 'run-1', 'run-1', 'd' * 64)}.m",
        BUNDLE,
    )
    assert gone(story, *of_run) == []
    assert len(gone(story, *(subject.replace("run-1", other) for subject in of_run[:-1]))) == len(of_run) - 1
    story.tell(RunCancelRequested(run="run-1"))
    assert gone(story, *of_run) == [], "it may go on"
    later = START + runs.RESUMABLE_FOR + SPARED + timedelta(hours=1)
    assert len(gone(story, *of_run, at=later)) == len(of_run)
    story.tell(RunCleanedUp(run="run-1"), RunRemoved(run="run-1"))
    assert len(gone(story, *of_run)) == len(of_run)


def test_a_bundle_stays_while_a_rule_or_a_release_names_it() -> None:
    story = Story()
    assert gone(story, BUNDLE) == [f"{S.blob(APP.bundle.digest)}.>"]
    rule = {"name": "r", "on": "x", "do": {"kind": "run", "app": APP.model_dump()}}
    story.tell(TriggerApplied(rule=TriggerRule.model_validate(rule)))
    assert gone(story, BUNDLE) == []
    story = Story()
    story.tell(requested(model="m"), produced(), published())
    assert gone(story, BUNDLE) == []


def test_blobs_of_releases_stay_and_what_a_run_made_until_it_is_published() -> None:
    story = Story()
    story.tell(requested(model="m"), produced(), RunCompleted(run="run-1", attempt=1))
    upload = f"{S.release_upload('run-1', 'b' * 64)}.0"
    assert gone(story, upload) == []
    story.tell(published())
    kept = [f"{S.release_blob(letter * 64)}.0" for letter in "bcde"]
    assert gone(story, *kept) == []
    assert gone(story, upload, f"{S.release_blob('f' * 64)}.0") == [
        f"{S.release_blob('f' * 64)}.>",
        S.release_uploads("run-1"),
    ]
    reference = S.drift_reference("eu", "m", ref("e").digest[:16])
    assert gone(story, reference) == [] and gone(story, reference.replace("e" * 16, "f" * 16))


def test_what_nobody_stores_goes_and_reports_stay_until_they_are_read() -> None:
    story = Story()
    assert gone(story, S.report("eu", "n1", "joined"), S.drift("eu", "n1", "m", 7)) == []
    assert gone(story, "ft.v1.default.up.eu.n1.blob.x.y.0.0") == ["ft.v1.default.up.eu.n1.blob.x.y.0.0"]
    assert gone(story, "ft.v1.default.up.eu.n1.rpt.x.y") == ["ft.v1.default.up.eu.n1.rpt.x.y"]


def test_orders_of_a_removed_node_go() -> None:
    story = Story()
    story.tell(joined("n1"))
    orders = [S.desired("eu", node, "m") for node in ("n1", "n2")]
    assert gone(story, *orders) == [orders[1]]


def test_what_a_revoked_node_has_sent_goes() -> None:
    story = Story()
    until = START + timedelta(days=1)
    token = JoinTokenCreated(token="t", key="UT", uses=1, expires_at=until)
    enrolled = NodeEnrolled(node="n2", region="eu", token="t", key="U2", expires_at=until)
    story.tell(joined("n1"), joined("n2"), token, enrolled, requested(), NodeRevoked(node="n2", reason="stolen"))
    sent = [f"{S.update_blob('eu', node, 'run-1', 'd' * 64)}.0" for node in ("n1", "n2", "fold")]
    assert gone(story, *sent) == [] and gone(story, *sent, members_only=True) == [f"{S.root}.up.eu.n2.blob.run-1.>"]


def test_the_newest_snapshot_stays() -> None:
    old, new = (f"{S.snapshot_blob(letter * 64)}.0" for letter in "ab")
    found = garbage({old: 1, new: 1}, needed(Story().world, START, "b" * 64))
    assert [g.pattern for g in found] == [old.removesuffix("0") + ">"]


def test_who_has_the_most_is_said() -> None:
    counts = {f"{S.update_blob('eu', 'n1', 'r', 'd' * 64)}.{i}": 1 for i in range(5)}
    counts |= {S.report("eu", "n2", "joined"): 2, "ft.v1.default.up.eu": 9}
    assert largest_holders(counts.items()) == [("n1", 5), ("n2", 2)]


def test_run_folders_go_a_week_after_their_end(tmp_path: Path) -> None:
    for name in ("old", "fresh", "active"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "aggregator.log").write_text("x")
        if name != "fresh":
            for each in (tmp_path / name / "aggregator.log", tmp_path / name):
                os.utime(each, (0, 0))
    (found,) = run_folders.forgotten(tmp_path, {"active"})
    assert found.name == "old"
    run_folders.delete(found)
    assert run_folders.forgotten(tmp_path, {"active"}) == [] and not found.exists()
    assert run_folders.forgotten(tmp_path / "nowhere", ()) == []
