"""Releases get their versions once; nodes are selected the same way each time."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
from pydantic import ValidationError

from fedtide.coordinator.adapters.distribution import kept_blobs
from fedtide.coordinator.commands import PublishAccount, PublishRelease
from fedtide.coordinator.rollouts.planning import least_seconds, plan
from fedtide.fabric.errors import ConfigError, InvalidTransition, NotFound
from fedtide.fabric.events.envelope import NodeOffline, NodeOnline
from fedtide.fabric.events.identity import JoinTokenCreated, NodeEnrolled, NodeRevoked
from fedtide.fabric.plans.rollout_request import RolloutRequest
from tests.scenarios.build import START, Story, joined, produced, published, ref, requested, rollout, wave


def _fleet(*, nodes: int = 3, regions: tuple[str, ...] = ("eu", "us")) -> Story:
    story = Story()
    for region in regions:
        for number in range(nodes):
            story.tell(joined(f"{region}-{number}", region, labels={"zone": "ab"[number % 2]}))
    return story


def test_what_a_run_produced_becomes_one_release_however_often_it_is_reported() -> None:
    story = Story()
    assert story.tell(requested(), produced()) == (PublishRelease(produced(), 1),)
    assert story.tell(produced()) == ()
    assert story.pending_commands()[-1] == PublishRelease(produced(), 1)
    story.tell(published(), published(), produced())
    assert [r.manifest.version for r in story.world.model("m").releases] == [1]
    assert not [c for c in story.pending_commands() if isinstance(c, PublishRelease)]


def test_two_runs_that_end_together_get_different_versions_whatever_is_published_first() -> None:
    story = Story()
    story.tell(requested("run-1"), requested("run-2"), produced("run-1"), produced("run-2"))
    story.tell(published("run-2", 2, "f"), published("run-1", 1, "e"))
    assert [r.manifest.version for r in story.world.model("m").releases] == [1, 2]


def test_a_node_is_online_from_its_joining_until_it_is_missed() -> None:
    story = _fleet(nodes=1, regions=("eu",))
    story.tell(NodeOffline(node="eu-0", reason="no heartbeat for 6 s"))
    assert story.world.node("eu-0").reason == "no heartbeat for 6 s"
    story.tell(NodeOnline(node="eu-0"))
    assert story.world.node("eu-0").online
    with pytest.raises(InvalidTransition):
        story.tell(NodeOnline(node="ghost"))


def _with_release() -> Story:
    story = _fleet()
    story.tell(requested(), produced(), published())
    return story


def test_a_plan_takes_regions_in_order_with_canaries_in_each() -> None:
    story = _with_release()
    request = RolloutRequest(model="m", regions=["us", "eu"], canary=0.3)
    planned = plan(request, story.world.model("m"), story.world.nodes.values(), {})
    assert [w.region for w in planned.waves] == ["us", "eu"]
    assert [len(w.canaries) for w in planned.waves] == [1, 1]
    assert [w.group for w in planned.waves] == [0, 1]
    assert {*planned.waves[0].canaries, *planned.waves[0].nodes} == {"us-0", "us-1", "us-2"}


def test_a_retry_picks_the_same_canaries() -> None:
    story = _with_release()
    request = RolloutRequest(model="m", canary=0.5)
    plans = [plan(request, story.world.model("m"), list(story.world.nodes.values())[::step], {}) for step in (1, -1)]
    assert plans[0] == plans[1]


def _plan(story: Story, **request: Any) -> Any:
    return plan(
        RolloutRequest(model="m", **request),
        story.world.model("m"),
        story.world.nodes.values(),
        story.world.serving.get("m", {}),
    )


def test_canaries_cover_every_hardware_class_before_any_gets_a_second() -> None:
    story = Story()
    for number in range(40):
        story.tell(joined(f"n{number}", hardware="rare" if number == 7 else "common"))
    story.tell(requested(), produced(), published())
    canaries = _plan(story, canary=2).waves[0].canaries
    assert "n7" in canaries
    assert len(canaries) == 2
    with pytest.raises(ConfigError, match="Leave it out for the first release"):
        _plan(story, gates=[{"kind": "paired"}])
    story.world.serving["m"] = {f"n{number}": ref("f") for number in range(40)}
    slices = _plan(story, gates=[{"kind": "paired", "slices": ["hardware"]}]).slices
    assert slices["hardware=rare"] == ["n7"]


def test_regions_of_an_inner_list_go_together_and_some_wait_for_a_person() -> None:
    planned = _plan(_with_release(), regions=[["eu", "us"]], approve=["us", "canary"])
    assert [(w.region, w.group, w.approval) for w in planned.waves] == [("eu", 0, False), ("us", 0, True)]
    assert planned.approve_after_canary


def test_the_nodes_of_a_region_stay_below_its_bandwidth_together() -> None:
    planned = _plan(_with_release(), region_bytes_per_s=3000, node_bytes_per_s=2000)
    assert planned.terms.bytes_per_s == 1000
    assert least_seconds(planned, {"eu": 6000, "us": 0}, 500) == pytest.approx(2 + 4 * 0.5)


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        ({"min_attempted": 2, "canary": 0.3}, "stage of 1"),
        ({"regions": ["eu", ["eu", "us"]]}, "twice"),
        ({"approve": ["mars"]}, "mars"),
        ({"gates": [{"kind": "metric", "pass_if": "errors <"}]}, "invalid syntax"),
        ({"gates": [{"kind": "metric", "pass_if": "().__class__"}]}, "names no field"),
        ({"window": {"start": "22:00", "end": "04:00", "timezone": "Mars/Base"}}, "no time zone"),
    ],
)
def test_a_plan_that_cannot_work_is_refused_before_it_starts(request_: dict[str, Any], words: str) -> None:
    with pytest.raises((ConfigError, ValidationError), match=words):
        _plan(_with_release(), **request_)


def test_a_plan_names_what_each_node_goes_back_to() -> None:
    story = _with_release()
    served = {"eu-1": ref("f"), "elsewhere": ref("d")}
    planned = plan(RolloutRequest(model="m"), story.world.model("m"), story.world.nodes.values(), served)
    assert planned.previous == {"eu-1": ref("f")}


def test_a_node_that_is_away_is_no_canary() -> None:
    story = _with_release()
    request = RolloutRequest(model="m", canary=0.3)
    first = plan(request, story.world.model("m"), story.world.nodes.values(), {}).waves[0].canaries
    story.tell(NodeOffline(node=first[0], reason="stopped"))
    assert plan(request, story.world.model("m"), story.world.nodes.values(), {}).waves[0].canaries != first


def test_the_success_floor_follows_the_allowed_errors() -> None:
    story = _with_release()
    request = RolloutRequest(model="m", max_error=0.25)
    assert plan(request, story.world.model("m"), story.world.nodes.values(), {}).min_success == 0.75


def test_unknown_regions_releases_and_empty_cohorts_are_refused_with_what_is_known() -> None:
    story = _with_release()
    model, nodes = story.world.model("m"), story.world.nodes.values()
    with pytest.raises(ConfigError, match="mars"):
        plan(RolloutRequest(model="m", regions=["mars"]), model, nodes, {})
    with pytest.raises(NotFound, match="release 9"):
        plan(RolloutRequest(model="m", version=9), model, nodes, {})
    with pytest.raises(NotFound, match="cohort"):
        plan(RolloutRequest(model="m", selector={"zone": "x"}), model, nodes, {})


def test_a_region_keeps_what_is_served_what_it_may_go_back_to_and_the_two_newest() -> None:
    story = _fleet(nodes=1)
    for version, letter in enumerate("123456", start=1):
        onnx = published(f"run-{version}", version, letter)
        manifest = onnx.manifest.model_copy(update={"onnx": ref("ab9ef8"[version - 1])})
        story.tell(onnx.model_copy(update={"manifest": manifest}))
    story.world.serving["m"] = {"eu-0": ref("1"), "us-0": ref("2")}
    story.tell(rollout(wave("eu", "", "eu-0"), previous={"eu-0": ref("3")}, release=ref("4")))
    kept = kept_blobs("eu", story.world)
    assert kept is not None
    digests = {letter * 64 for letter in "123456"}
    assert digests & kept == {letter * 64 for letter in "13456"}
    assert "a" * 64 in kept, "the ONNX file of a kept release is kept with it"
    assert "b" * 64 not in kept
    story.world.serving["m"]["eu-0"] = ref("0")
    assert kept_blobs("eu", story.world) is None


def test_the_desired_counter_grows_by_two_a_roll_out() -> None:
    story = _with_release()
    story.tell(rollout(wave("eu", "", "eu-0"), counter=1))
    assert story.world.model("m").counter == 2


def test_withdrawn_keys_are_told_again_after_a_restart() -> None:
    story = Story()
    assert PublishAccount() not in story.pending_commands()
    expires = START + timedelta(days=365)
    token = JoinTokenCreated(token="t1", key="UT", region="eu", uses=1, expires_at=expires, by="test")
    story.tell(token, NodeEnrolled(node="a", region="eu", token="t1", key="UA", expires_at=expires))
    assert PublishAccount() in story.tell(NodeRevoked(node="a", reason="stolen"))
    assert PublishAccount() in story.pending_commands()
