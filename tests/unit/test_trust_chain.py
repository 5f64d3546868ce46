"""What a root's metadata delegate, what replaces them, and when they count no more."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest

from fedtide.fabric import merkle
from fedtide.fabric.errors import ConfigError
from fedtide.fabric.messages.trust import TrustKnown, TrustMetadata
from fedtide.fabric.trust import ceremony, keys
from fedtide.fabric.trust.chain import Chain, Files, app_path, order_path, release_path
from fedtide.fabric.trust.refusals import Untrusted
from fedtide.fabric.trust.signatures import sign
from fedtide.fabric.trust.store import TrustStore, pin_of
from fedtide.fabric.trust.trusted_time import TrustedTime
from tests.trust import NOW, Keys, Published


def day(days: float) -> float:
    return (NOW + timedelta(days=days)).timestamp()


def chain_of(published: Published, days: float = 0) -> Chain:
    chain, refusal = Chain(Files(published.metadata.roots[0])).updated(published.metadata, day(days))
    assert refusal is None, refusal
    return chain


def refusal_of(chain: Chain, published: Published, days: float) -> str:
    after, refusal = chain.updated(published.metadata, day(days))
    assert refusal is not None
    assert after.files.targets == chain.files.targets
    return refusal.kind


def test_a_key_signs_what_it_was_delegated_and_nothing_else() -> None:
    first = Published.first(apps=["digits*"], models=["digits"])
    chain, of = chain_of(first), first.keys
    may = [
        (of.director, order_path("eu", "eu-1"), "director"),
        (of.publisher, app_path("digits-2"), "publisher-al"),
        (of.releases, release_path("digits", 3), "releases"),
    ]
    for key, path, role in may:
        assert chain.roles_for(path, b"x", sign([key], b"x"), day(1)) == {role}
    may_not = [
        (of.director, app_path("digits")),
        (of.director, release_path("digits", 1)),
        (of.publisher, app_path("other")),
        (of.publisher, app_path("../orders/eu")),
        (of.releases, release_path("other", 1)),
        (of.releases, order_path("eu", "eu-1")),
        (of.timestamp, order_path("eu", "eu-1")),
        (of.root, order_path("eu", "eu-1")),
    ]
    for key, path in may_not:
        with pytest.raises(Untrusted) as refused:
            chain.roles_for(path, b"x", sign([key], b"x"), day(1))
        assert refused.value.kind in ("wrong_target", "unknown_signer"), path


@pytest.mark.parametrize(
    ("signatures", "kind"),
    [({}, "arbitrary"), ({"f" * 64: "00"}, "unknown_signer")],
    ids=["unsigned", "stranger"],
)
def test_without_a_signature_that_counts_nothing_is_believed(signatures: dict[str, str], kind: str) -> None:
    with pytest.raises(Untrusted) as refused:
        chain_of(Published.first()).roles_for(order_path("eu", "n"), b"x", signatures, day(0))
    assert refused.value.kind == kind


def test_a_signature_is_good_for_its_bytes_only() -> None:
    first = Published.first()
    chain, signed = chain_of(first), sign([first.keys.director], b"x")
    for other in (b"y", b""):
        with pytest.raises(Untrusted) as refused:
            chain.roles_for(order_path("eu", "n"), other, signed, day(0))
        assert refused.value.kind == "arbitrary"
    broken = dict.fromkeys(signed, "no hexadecimal number")
    with pytest.raises(Untrusted):
        chain.roles_for(order_path("eu", "n"), b"x", broken, day(0))


def test_as_many_keys_must_sign_as_the_role_says() -> None:
    first, others = Published.first(), [keys.new() for _ in range(3)]
    roles = {**first.keys.roles(), "releases": ceremony.role_of("releases", [k.public_key for k in others], (), 2)}
    targets = ceremony.targets(roles, [first.keys.root], NOW, 2)
    published = replace(first, metadata=first.metadata.model_copy(update={"targets": targets}), targets=2).vouched(0)
    chain, path = chain_of(published), release_path("m", 1)
    assert chain.roles_for(path, b"x", sign(others[:2], b"x"), day(0)) == {"releases"}
    for few in (others[:1], [others[0], others[0]], [others[0], first.keys.releases]):
        with pytest.raises(Untrusted):
            chain.roles_for(path, b"x", sign(few, b"x"), day(0))


def test_what_is_older_than_what_was_seen_is_refused() -> None:
    first = Published.first()
    newer = first.delegating(1, Keys())
    chain = chain_of(newer, 1)
    assert refusal_of(chain, first, 1) == "rollback"
    # The newest timestamp with the delegations of before: the snapshot says which belong to it.
    mixed = replace(newer, metadata=newer.vouched(2).metadata.model_copy(update={"targets": first.metadata.targets}))
    assert refusal_of(chain, mixed, 2) == "rollback"


def test_metadata_that_nobody_vouches_for_any_more_freeze_what_is_new() -> None:
    first = Published.first()
    chain = chain_of(first)
    with pytest.raises(Untrusted) as refused:
        chain.roles_for(order_path("eu", "n"), b"x", sign([first.keys.director], b"x"), day(8))
    assert refused.value.kind == "freeze"
    assert refusal_of(chain, first, 8) == "freeze"
    later = chain.updated(first.vouched(8).metadata, day(8))[0]
    assert later.roles_for(order_path("eu", "n"), b"x", sign([first.keys.director], b"x"), day(9)) == {"director"}


def test_delegations_end_with_the_offline_keys_word() -> None:
    first = Published.first()
    chain = chain_of(first.vouched(364), 364)
    with pytest.raises(Untrusted) as refused:
        chain.roles_for(order_path("eu", "n"), b"x", sign([first.keys.director], b"x"), day(366))
    assert refused.value.kind == "expired"


def test_online_keys_delegate_nothing() -> None:
    first = Published.first()
    chain = chain_of(first)
    for thief in (first.keys.timestamp, first.keys.director, first.keys.releases):
        stolen = first.delegating(1, Keys(), by=thief)
        assert refusal_of(chain, stolen, 1) == "unknown_signer"
    other = Published.first()
    theirs = replace(first, metadata=first.metadata.model_copy(update={"roots": other.metadata.roots}))
    of_others = replace(other, metadata=other.metadata.model_copy(update={"roots": [*theirs.metadata.roots]}))
    assert refusal_of(chain, of_others, 1) in ("unknown_signer", "arbitrary")
    root = ceremony.next_root(first.metadata.roots[0], Keys().offline, [first.keys.timestamp], NOW)
    grabbed = replace(first, metadata=TrustMetadata(roots=[first.metadata.roots[0], root]))
    assert refusal_of(chain, grabbed, 1) == "unknown_signer"


def test_a_node_that_was_away_for_a_month_follows_every_key_that_was_replaced(tmp_path: Path) -> None:
    first = Published.first()
    there = TrustStore(tmp_path)
    there.set_pin(pin_of(first.metadata.roots[0]))
    there.take(first.metadata)
    away = TrustStore(tmp_path)  # it starts again after a month
    assert away.known == TrustKnown(root=1, timestamp=1)
    now = first
    for days in (5, 12, 19):  # the root, and with it all keys, three times
        now = now.rooted(days, Keys()).delegating(days + 1, Keys())
    now = now.vouched(31)
    away.take(now.metadata)
    chain, at = away.chain, away.now()
    assert chain is not None
    assert chain.known == TrustKnown(root=4, timestamp=now.version)
    assert at >= day(31) - 5
    assert chain.roles_for(order_path("eu", "n"), b"x", sign([now.keys.director], b"x"), at) == {"director"}
    with pytest.raises(Untrusted) as refused:
        chain.roles_for(order_path("eu", "n"), b"x", sign([first.keys.director], b"x"), at)
    assert refused.value.kind == "unknown_signer"
    with pytest.raises(Untrusted):
        TrustStore(tmp_path).take(first.metadata)  # what it has seen it has seen, also after a power cut


def test_a_root_is_the_one_of_the_join_token(tmp_path: Path) -> None:
    ours, theirs = Published.first(), Published.first()
    there = TrustStore(tmp_path)
    there.set_pin(pin_of(ours.metadata.roots[0]))
    with pytest.raises(Untrusted) as refused:
        there.take(theirs.metadata)
    assert refused.value.kind == "arbitrary"
    assert there.known == TrustKnown()
    there.take(ours.metadata)
    with pytest.raises(Untrusted):
        there.take(theirs.metadata)
    there.set_pin(pin_of(ours.metadata.roots[0]))  # another token of the same installation changes nothing
    assert there.known == TrustKnown(root=1, timestamp=1)
    there.set_pin(pin_of(theirs.metadata.roots[0]))  # its owner gives it away
    assert there.known == TrustKnown()
    there.take(theirs.metadata)
    assert there.known == TrustKnown(root=1, timestamp=1)


@pytest.mark.parametrize("junk", ["", "{}", "[]", "nonsense", '{"signed": {"_type": "root"}}', '{"signatures": []}'])
def test_metadata_that_are_none_change_nothing(junk: str) -> None:
    chain = chain_of(Published.first())
    for name in ("timestamp", "snapshot", "targets"):
        offered = Published.first().metadata.model_copy(update={name: junk})
        after, _ = chain.updated(offered, day(0))
        assert after.files == chain.files
    after, refusal = chain.updated(TrustMetadata(roots=[junk]), day(0))
    assert after.files == chain.files
    assert refusal is not None


def test_nobody_turns_the_time_back_and_online_keys_do_not_end_what_offline_keys_have_signed(tmp_path: Path) -> None:
    first = Published.first()
    there = TrustStore(tmp_path)
    there.set_pin(pin_of(first.metadata.roots[0]))
    there.take(first.metadata)
    there.told(day(3))
    there.told(day(1))
    assert there.now() >= day(3)
    there.told(day(100_000))
    assert there.chain is not None
    assert there.now() <= there.chain.horizon + 60
    there.take(first.delegating(364, Keys()).metadata)  # what comes in time is still taken


def test_a_time_survives_a_restart(tmp_path: Path) -> None:
    clock = TrustedTime(tmp_path / "time")
    clock.told(day(1))
    assert abs(TrustedTime(tmp_path / "time").now() - day(1)) < 5


def test_the_root_of_a_tree_names_every_leaf_and_their_order() -> None:
    leaves = [merkle.leaf(str(number).encode()) for number in range(7)]
    roots = {merkle.root(leaves[:count]) for count in range(8)}
    assert len(roots) == 8
    assert merkle.root(leaves) != merkle.root(leaves[::-1])
    # RFC 6962, 2.1.3: the tree of seven leaves is that of four, and that of the other three.
    assert merkle.root(leaves) == merkle.root([merkle.root(leaves[:4]), merkle.root(leaves[4:])])


@pytest.mark.parametrize(
    "timestamp",
    ["x", "[" * 5000, '{"signed": {"_type": "timestamp", "x-fedtide-issued": 1e999}}', "{" * 900 + "}" * 900],
    ids=["no-json", "deep", "infinite", "deep-objects"],
)
def test_what_anybody_may_have_written_into_an_answer_is_refused_and_no_more(timestamp: str, tmp_path: Path) -> None:
    first = Published.first()
    there = TrustStore(tmp_path)
    there.set_pin(pin_of(first.metadata.roots[0]))
    there.take(first.metadata)
    with pytest.raises(Untrusted):
        there.take(first.metadata.model_copy(update={"timestamp": timestamp}))
    with pytest.raises(Untrusted):
        TrustStore(tmp_path / "new").take(TrustMetadata(roots=[timestamp]))
    assert there.known == TrustKnown(root=1, timestamp=1)


def test_a_new_root_ends_the_time_that_the_keys_before_have_told(tmp_path: Path) -> None:
    first = Published.first()
    there = TrustStore(tmp_path)
    there.set_pin(pin_of(first.metadata.roots[0]))
    there.take(first.vouched(360).metadata)  # a clock that was ahead, or a thief
    assert there.now() > day(359)
    there.take(first.rooted(2, Keys()).metadata)
    assert abs(there.now() - day(2)) < 60


def test_patterns_are_spelled_as_names_are() -> None:
    chain, of = chain_of(Published.first(apps=["@org/*", "my app"])), None
    for name in ("@org/digits", "my app"):
        with pytest.raises(Untrusted) as refused:
            chain.roles_for(app_path(name), b"x", sign([keys.new()], b"x"), day(0))
        assert refused.value.kind == "unknown_signer", of
    for bad in ("publisher-../x", "publisher-", "publisher-a/b", "anything"):
        with pytest.raises(ConfigError):
            ceremony.role_of(bad, [keys.new().public_key])
