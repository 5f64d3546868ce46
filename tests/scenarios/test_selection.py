"""Who is asked: eligible nodes, the same ones each time, the least burdened first."""

from __future__ import annotations

from typing import Any

import pytest

from fedtide.coordinator.fleet.fleet import Node
from fedtide.coordinator.runs import selection
from fedtide.fabric.events.envelope import NodeOffline
from fedtide.fabric.plans.round_policy import Selection
from fedtide.fabric.plans.run_spec import RunSpec
from tests.scenarios.build import APP, Story, joined, opened, requested


def _fleet(count: int = 6) -> Story:
    story = Story()
    for number in range(count):
        labels = {"zone": "ab"[number % 2]}
        region = "eu" if number < count // 2 else "us"
        extras = ["flwr"] if number else []
        story.tell(joined(f"n{number}", region, labels=labels, samples=10 * number, extras=extras))
    return story


def _names(story: Story, run: str = "run-1", number: int = 1, phase: str = "train", trial: int = 1, **spec: Any) -> str:
    world = story.world
    asking = selection.Asking(run, number, trial, phase)
    wanted = RunSpec.model_validate({"app": APP, **spec})
    nodes: list[Node] = list(reversed(world.nodes.values()))
    chosen = selection.choose(nodes, wanted, asking, world.tasks_of_others(run), world.last_asked)
    return " ".join(n.name for n in chosen)


def test_all_online_nodes_that_carry_every_label_are_asked_in_a_stable_order() -> None:
    story = _fleet()
    story.tell(NodeOffline(node="n0", reason="stopped"))
    assert _names(story, selector={"zone": "a"}) == "n2 n4"
    assert _names(story, selector={"region": "eu|us", "zone": "b"}) == "n1 n3 n5"
    assert _names(story, selector={"zone": "c"}) == ""


def test_nodes_with_partitions_are_ordered_by_them() -> None:
    story = Story()
    for name, partition in (("a", 2), ("b", 10), ("c", 1)):
        story.tell(joined(name, node_config={"partition-id": partition}))
    assert _names(story) == "c a b"


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        (Selection(needs=["flwr"]), "n1 n2 n3 n4 n5"),
        (Selection(min_samples=30), "n3 n4 n5"),
        (Selection(min_memory_bytes=2), ""),
        (Selection(nodes=2, prefer="most_samples"), "n4 n5"),
    ],
)
def test_capability_and_data_decide_who_is_eligible(wanted: Selection, expected: str) -> None:
    assert _names(_fleet(), selection=wanted) == expected


def test_the_same_seed_selects_the_same_nodes_after_a_replay_and_another_seed_others() -> None:
    story = _fleet(50)
    wanted = Selection(nodes=5, prefer="random", seed=1)
    first = _names(story, selection=wanted)
    story.world = story.replayed()
    assert _names(story, selection=wanted) == first
    assert _names(story, selection=Selection(nodes=5, prefer="random", seed=2)) != first
    assert _names(story, selection=wanted, number=2) != first
    assert _names(story, selection=wanted, trial=2) != first


def test_over_provisioning_asks_more_for_training_only() -> None:
    wanted = Selection(nodes=3, over_provision=1.3)
    assert len(_names(_fleet(), selection=wanted).split()) == 4
    assert len(_names(_fleet(), selection=wanted, phase="evaluate").split()) == 3


def test_a_fraction_is_of_the_eligible_nodes() -> None:
    assert len(_names(_fleet(), selection=Selection(fraction=0.5)).split()) == 3


def test_every_node_has_its_turn_before_one_has_two() -> None:
    story = _fleet()
    story.tell(requested())
    asked = []
    for number in range(1, 4):
        names = _names(story, number=number, selection=Selection(nodes=2)).split()
        asked += names
        story.tell(opened(number, *names))
    assert sorted(asked) == ["n0", "n1", "n2", "n3", "n4", "n5"]


def test_nodes_that_work_for_another_run_come_last_or_not_at_all() -> None:
    story = _fleet()
    story.tell(requested("run-2"), opened(1, "n0", "n1", "n2", run="run-2"))
    assert _names(story, selection=Selection(nodes=3)) == "n3 n4 n5"
    assert _names(story, selection=Selection(idle=True)) == "n3 n4 n5"
    assert len(_names(story, selection=Selection(nodes=4)).split()) == 4


def test_why_a_node_takes_no_part_is_said() -> None:
    story = _fleet()
    story.tell(NodeOffline(node="n1", reason="stopped"))
    node = story.world.node("n1")
    spec = RunSpec(app=APP, selection=Selection(min_samples=100))
    assert selection.why_not(node, spec) == "offline: stopped"
    assert "wanted are 100" in (selection.why_not(story.world.node("n2"), spec) or "")
