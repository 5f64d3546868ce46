"""Keys, tokens and names: what is given to whom, what replaces what, and who is believed."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta

import pytest

from fedtide.coordinator.commands import SetDesired
from fedtide.coordinator.identity import identities
from fedtide.fabric.errors import InvalidTransition
from fedtide.fabric.events.envelope import EventData, NodeOffline
from fedtide.fabric.events.identity import (
    JoinTokenCreated,
    LogBegun,
    LogRestored,
    NodeEnrolled,
    NodeRemoved,
    NodeRevoked,
    RegionIssued,
    RegionRemoved,
)
from fedtide.fabric.events.runs import RunCleanedUp, RunFailed
from fedtide.fabric.nats.accounts import CORE, NODES, RUNS
from fedtide.fabric.nats.authority import ALL_ISSUED
from tests.scenarios.build import START, Story, joined, phase, requested, rollout, wave

MONTHS = timedelta(days=90)


def token(name: str = "t1", uses: int = 9) -> JoinTokenCreated:
    return JoinTokenCreated(token=name, key=f"U-{name}", uses=uses, expires_at=START + timedelta(days=365))


def enrolled(node: str, key: str, *, by: str = "t1", region: str = "eu", after: timedelta = MONTHS) -> NodeEnrolled:
    return NodeEnrolled(node=node, region=region, key=key, expires_at=START + after, token=by)


def renewed(node: str, key: str, renews: str, *, after: timedelta) -> NodeEnrolled:
    return NodeEnrolled(node=node, region="eu", key=key, expires_at=START + MONTHS + after, renews=renews)


@pytest.fixture
def story() -> Story:
    told = Story()
    told.tell(token(), enrolled("a", "A"))
    return told


def keys(story: Story, node: str = "a") -> list[str]:
    return [key for key, _ in story.world.identities.nodes[node].keys]


def test_a_renewal_whose_answer_was_lost_does_not_withdraw_the_key_in_use(story: Story) -> None:
    story.tell(renewed("a", "B", "A", after=timedelta(days=60)))
    assert keys(story) == ["A", "B"]
    # The node never heard of B: it asks again, with the key that it has.
    story.tell(renewed("a", "C", "A", after=timedelta(days=62)))
    assert keys(story) == ["A", "C"]
    assert set(story.world.identities.withdrawn) == {"B"}
    story.tell(renewed("a", "D", "C", after=timedelta(days=80)))
    assert keys(story) == ["C", "D"]
    assert set(story.world.identities.withdrawn) == {"A", "B"}


def test_a_node_renews_once_a_day_at_most(story: Story) -> None:
    story.tell(renewed("a", "B", "A", after=timedelta(days=60)))
    for key in ("C", "D"):
        with pytest.raises(InvalidTransition, match="has renewed its credentials today"):
            story.tell(renewed("a", key, "B", after=timedelta(days=60, hours=3)))
    assert keys(story) == ["A", "B"]


def test_a_key_is_that_of_one_identity_for_ever(story: Story) -> None:
    for taken in (enrolled("b", "A"), enrolled("b", "U-t1"), enrolled("a", "A", region="us")):
        with pytest.raises(InvalidTransition, match="belongs to another identity"):
            story.tell(taken)
    story.tell(NodeRevoked(node="a"), token("t2"))
    with pytest.raises(InvalidTransition, match="or was withdrawn"):
        story.tell(enrolled("a", "A", by="t2"))
    story.tell(enrolled("a", "B", by="t2"))


def test_a_region_has_the_credentials_of_the_time_before_until_the_next_ones_or_a_rotation(story: Story) -> None:
    for number in (1, 2):
        story.tell(RegionIssued(region="eu", keys=[f"E{number}"], rotates=False))
    assert not story.world.identities.withdrawn, "the server that runs goes on with what it has"
    story.tell(RegionIssued(region="eu", keys=["E3"], rotates=False))
    assert set(story.world.identities.withdrawn) == {"E1"}
    story.tell(RegionIssued(region="eu", keys=["E4"], rotates=True))
    assert set(story.world.identities.withdrawn) == {"E1", "E2", "E3"}
    story.tell(NodeRevoked(node="a"))
    assert set(identities.void_in(story.world.identities, "region-eu")) == {"E1", "E2", "E3"}
    assert set(identities.void_in(story.world.identities, NODES)) == {"E1", "E2", "E3", "A"}


def test_a_region_renews_with_what_it_has_and_that_is_what_stays(story: Story) -> None:
    ends = START + timedelta(days=400)

    def renewed_region(key: str, renews: str, days: float) -> RegionIssued:
        after = ends + timedelta(days=days)
        return RegionIssued(region="eu", keys=[key, f"{key}2"], rotates=False, expires_at=after, renews=renews)

    story.tell(RegionIssued(region="eu", keys=["E1", "E12"], rotates=False, expires_at=ends))
    story.tell(renewed_region("E2", "E1", 7))
    assert not story.world.identities.withdrawn
    story.tell(renewed_region("E2", "E1", 7))  # it asks again for the same: the answer was lost
    with pytest.raises(InvalidTransition, match="got credentials today"):
        story.tell(renewed_region("E3", "E1", 7.5))
    story.tell(renewed_region("E3", "E1", 14))
    assert set(story.world.identities.withdrawn) == {"E2", "E22"}, "those that it never wrote down"
    assert story.world.identities.regions_before["eu"] == ("E1", "E12")
    for renews, why in (("E2", "has no such credentials"), ("A", "has no such credentials")):
        with pytest.raises(InvalidTransition, match=why):
            story.tell(renewed_region("E4", renews, 30))
    with pytest.raises(InvalidTransition, match="belongs to another identity"):
        story.tell(renewed_region("E1", "E3", 30))


def test_the_key_of_a_run_is_void_when_nothing_of_it_is_left(story: Story) -> None:
    story.tell(joined("a"), requested(), RunFailed(run="run-1", attempt=1, reason="x"))
    story.tell(RunCleanedUp(run="run-1", key="R"))
    found = story.world.identities
    assert set(identities.void_in(found, RUNS)) == {"R"}
    assert not identities.void_in(found, NODES), "what is void elsewhere does not disturb an account"
    assert not identities.void_in(found, CORE)


def test_many_ended_runs_are_void_by_a_date_and_those_after_it_by_name() -> None:
    ends = START + timedelta(days=30)
    few = {"R0": (START, ends)}
    assert identities.in_fewer(few, START) == few, "nothing changes for an installation with few runs"
    ended = {f"R{n}": (START + n * timedelta(hours=1), ends) for n in range(identities.RUNS_NAMED + 1)}
    since = START + timedelta(hours=900)
    found = dict(identities.in_fewer(ended, since))
    before, _ = found.pop(ALL_ISSUED)
    assert before == since - identities.CLOCKS_DIFFER, "a run that began at `since` is let in, whatever clock said so"
    assert {"R899", "R1000"} <= set(found) and "R0" not in found
    assert all(at <= before for key, (at, _) in ended.items() if key not in found)


def test_the_newest_withdrawn_keys_are_told_and_a_person_hears_of_the_others() -> None:
    ends, most = START + MONTHS, identities.MOST_NAMED
    state = identities.Identities(withdrawn={f"K{n}": (START + timedelta(seconds=n), ends) for n in range(most)})
    assert not identities.warnings(state)
    assert len(identities.void_in(state, NODES)) == most
    state = replace(state, withdrawn={**state.withdrawn, "new": (START + timedelta(days=1), ends)})
    told = identities.void_in(state, NODES)
    assert len(told) == most and "new" in told and "K0" not in told
    (said,) = identities.warnings(state)
    assert said.startswith("1 withdrawn keys") and "new authority" in said


def test_who_is_believed_as_a_node_of_a_region(story: Story) -> None:
    believed = lambda region, node: identities.why_no_member(story.world.identities, region, node) is None  # noqa: E731
    assert believed("eu", "a") and not believed("us", "a") and not believed("eu", "b")
    story.tell(NodeRevoked(node="a"))
    assert not believed("eu", "a")


def test_a_node_that_is_gone_for_good_is_no_target_and_can_be_forgotten(story: Story) -> None:
    story.tell(enrolled("b", "B"), joined("a"), joined("b"))
    assert [node.name for node in story.world.members()] == ["a", "b"]
    story.tell(NodeRevoked(node="b"))
    assert [node.name for node in story.world.members()] == ["a"], "nobody plans with a node that is shut out"
    with pytest.raises(InvalidTransition, match="is online"):
        story.tell(NodeRemoved(node="a"))
    story.tell(NodeRemoved(node="b"), NodeOffline(node="a", reason="stopped"), NodeRemoved(node="a"))
    assert not story.world.nodes and not story.world.identities.nodes
    assert set(story.world.identities.withdrawn) == {"A", "B"}
    assert story.replayed().nodes == story.world.nodes


def test_a_region_that_is_gone_is_forgotten_with_its_nodes(story: Story) -> None:
    ends = START + timedelta(days=400)
    story.tell(
        RegionIssued(region="us", keys=["L1"], rotates=False, expires_at=ends),
        RegionIssued(region="us", keys=["L2"], rotates=False, expires_at=ends),
        enrolled("b", "B", region="us"),
        joined("a"),
        joined("b", "us"),
    )
    with pytest.raises(InvalidTransition, match="online: b"):
        story.tell(RegionRemoved(region="us"))
    story.tell(NodeOffline(node="b", reason="stopped"), RegionRemoved(region="us"))
    known = story.world.identities
    assert set(story.world.nodes) == {"a"} and set(known.nodes) == {"a"} and known.region_ends == {}
    assert set(known.withdrawn) == {"L1", "L2", "B"}
    assert set(identities.void_in(known, "region-us")) >= {"L1", "L2"}


def test_a_node_that_a_restored_log_does_not_know_comes_back_with_its_key(story: Story) -> None:
    lost = renewed("c", "C2", "C1", after=timedelta(days=1))
    with pytest.raises(InvalidTransition, match="no credentials to renew"):
        story.tell(lost)
    story.tell(lost.model_copy(update={"rejoins": True}))
    assert keys(story, "c") == ["C1", "C2"]
    story.tell(NodeRevoked(node="a", reason="stolen"))
    for node in ("a", "d"):
        with pytest.raises(InvalidTransition, match=r"no credentials to renew|were withdrawn"):
            story.tell(renewed(node, "D2", "A", after=timedelta(days=2)).model_copy(update={"rejoins": True}))


def test_what_nodes_should_serve_is_told_again_after_the_log_was_put_back() -> None:
    story = Story()
    story.tell(LogBegun(epoch="one"), LogBegun(epoch="two"))
    assert (story.world.epoch.id, story.world.epoch.generation) == ("one", 0)
    commands = story.tell(*a_settled_rollout(), LogRestored(epoch="two", reason="a backup"))
    assert (story.world.epoch.id, story.world.epoch.generation) == ("two", 1)
    assert {c.node for c in commands if isinstance(c, SetDesired)} == {"eu-0"}


def a_settled_rollout() -> list[EventData]:
    plan = rollout(wave("eu", "", "eu-0"), counter=1)
    return [joined("eu-0"), plan, phase("eu-0", "confirmed", counter=1)]
